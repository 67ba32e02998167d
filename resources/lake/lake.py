"""`Lake`: one lakeFS repository as the project sees it. References, pinned reads, tags and pins, staged data, and the way to `write`.

How a write stays whole under crashes and other writers is in transaction.py; timeouts, retries and errors are in client.py.
"""

import contextlib
import io
import os
import re
import secrets
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, BinaryIO, Final, cast

from lakefs_sdk.models.branch_creation import BranchCreation
from lakefs_sdk.models.branch_protection_rule import BranchProtectionRule
from lakefs_sdk.models.commit import Commit
from lakefs_sdk.models.commit_creation import CommitCreation
from lakefs_sdk.models.object_stats import ObjectStats
from lakefs_sdk.models.tag_creation import TagCreation

from repro_assets.trust.blob import Blob, BlobDamaged
from repro_assets.trust.canonical import sha256
from resources.errors import Conflict, NotFound, NothingToCommit, Refused
from resources.lake.client import PATIENCE, Client, ObjectStream, Patience
from resources.lake.transaction import DEFAULT_AGE, Transaction, clean
from resources.lake.values import (
    CHECKSUM,
    Change,
    CommitInfo,
    Entry,
    Placement,
    Written,
    checked_branch,
    checked_commit,
    checked_metadata,
    checked_tag,
    separate,
)

if TYPE_CHECKING:
    from resources.settings import Connections

MAIN: Final = "main"
RAW: Final = "raw"
SHARED: Final = "shared"
PAGE: Final = 1000
STAGED_BY: Final = "staged-commit"  # metadata key that lets commit_staged know its own commit after a lost reply


class Lake:
    """One repository. Safe for many threads; make one per process."""

    def __init__(self, client: Client, repository: str, address: Callable[[Blob], str], *, owner: str | None = None) -> None:
        """`address` tells where a blob lies (Blobs.address). `owner` marks this writer's transactions for `clean`: a run id."""
        self.client = client
        self.repository = repository
        self.address = address
        self.owner = re.sub(r"\W+", "_", owner or f"{socket.gethostname()}_{os.getpid()}", flags=re.ASCII)[:60]

    @classmethod
    def connect(cls, connections: "Connections", *, owner: str | None = None, patience: Patience = PATIENCE) -> "Lake":
        """The repository of `connections`; no call is made yet."""
        from resources.blobs import address

        client = Client(connections.lakefs_endpoint, connections.lakefs_access_key, connections.lakefs_secret_key, patience)
        bucket = connections.blobs_bucket
        return cls(client, connections.repository, lambda blob: address(bucket, blob), owner=owner)

    # ---- branches

    def ensure(self) -> None:
        """The branches raw and shared exist and main is protected afterwards; repeat it freely. The repository must exist.

        The server applies a new protection rule within some 6 seconds.
        """
        self._protect(MAIN)
        missing = [name for name in (RAW, SHARED) if not self.exists(name)]
        if missing:
            *_, first = self.log(MAIN, page=PAGE)
            for name in missing:
                self.ensure_branch(name, first.id)

    def _protect(self, branch: str) -> None:
        repositories = self.client.repositories
        for _ in range(5):
            answer = self._call("read the branch protection rules", repositories.get_branch_protection_rules_with_http_info)
            if any(rule.pattern == branch for rule in answer.data):
                return
            rules, etag = [*answer.data, BranchProtectionRule(pattern=branch)], answer.headers["ETag"]
            with contextlib.suppress(Conflict):  # somebody else set rules in between: theirs must stay, so read them again
                self._call(f"protect {branch}", repositories.set_branch_protection_rules, rules, if_match=etag)
        raise Conflict(f"the branch protection rules of {self.repository!r} do not keep {branch!r}; set one by hand, or try again")

    def head(self, branch: str) -> str:
        """The commit id that `branch` points to now."""
        what = f"find branch {branch!r} of {self.repository!r}"
        return str(self._call(what, self.client.branches.get_branch, checked_branch(branch)).commit_id)

    def exists(self, branch: str) -> bool:
        """Whether there is such a branch."""
        try:
            self.head(branch)
        except NotFound:
            return False
        return True

    def branches(self, prefix: str = "", *, hidden: bool = False) -> Iterator[tuple[str, str]]:
        """(name, commit id) of the branches whose names start with `prefix`, by name."""
        listed = self._pages("list branches", self.client.branches.list_branches, prefix=prefix, show_hidden=hidden)
        return ((branch.id, branch.commit_id) for branch in listed)

    def ensure_branch(self, name: str, source: str, *, hidden: bool = False) -> str:
        """The head of branch `name`, which is made from `source` (commit id or branch) unless it exists already."""
        creation = BranchCreation(name=checked_branch(name), source=source, hidden=hidden)
        with contextlib.suppress(Conflict):
            self._call(f"make branch {name!r} from {source!r}", self.client.branches.create_branch, creation)
        return self.head(name)

    def delete_branch(self, name: str, *, attempts: int | None = None) -> None:
        """`name` is no branch afterwards. Its commits stay."""
        with contextlib.suppress(NotFound):
            self._call(f"delete branch {name!r}", self.client.branches.delete_branch, checked_branch(name), attempts=attempts)

    # ---- commits

    def commit_info(self, ref: str) -> CommitInfo:
        """The commit that `ref` (commit id, branch or tag) names now."""
        return _commit_info(self._call(f"find commit {ref!r} in {self.repository!r}", self.client.commits.get_commit, ref))

    def log(self, ref: str, prefix: str | None = None, *, first_parent: bool = True, page: int = 100) -> Iterator[CommitInfo]:
        """Commits from `ref` backwards, newest first; with `prefix` those that changed something below it.

        lakeFS leaves merge commits with two parents out of a log with a prefix. `write` makes commits with one parent.
        """
        options: dict[str, Any] = {"first_parent": first_parent}
        if prefix:
            options["prefixes"] = [prefix]
        return map(_commit_info, self._pages(f"read the log of {ref!r}", self.client.refs.log_commits, ref, amount=page, **options))

    # ---- pinned reads

    def stat(self, commit: str, path: str) -> Entry:
        """The entry at `path`; NotFound when there is none."""
        what = f"find {path!r} at {commit[:12]}"
        return _entry(self._call(what, self.client.objects.stat_object, checked_commit(commit), path))

    def list(self, commit: str, prefix: str = "", *, after: str = "") -> Iterator[Entry]:
        """Entries below `prefix`, by path in byte order, fetched a page at a time."""
        what = f"list {prefix!r} at {commit[:12]}"
        return map(_entry, self._pages(what, self.client.objects.list_objects, checked_commit(commit), prefix=prefix, after=after))

    def open(self, commit: str, path: str) -> BinaryIO:
        """A stream of the object's bytes; the caller verifies them."""
        return cast(BinaryIO, io.BufferedReader(ObjectStream(self.client, self.repository, checked_commit(commit), path), 1 << 20))

    def read(self, commit: str, path: str) -> bytes:
        """The object's bytes; BlobDamaged when lakeFS knows their SHA-256 and they are not of it."""
        with ObjectStream(self.client, self.repository, checked_commit(commit), path) as stream:
            data = stream.readall()
            checksum = stream.checksum
        if checksum.startswith(CHECKSUM) and CHECKSUM + sha256(data) != checksum:
            raise BlobDamaged(
                f"{path!r} at commit {commit[:12]} of {self.repository!r} should be {checksum} but its {len(data)} bytes have SHA-256 "
                f"{sha256(data)}: the object behind {self.stat(commit, path).address} was changed; restore it from another copy"
            )
        return data

    def diff(self, left: str, right: str, prefix: str = "") -> Iterator[Change]:
        """What differs from commit `left` to commit `right` below `prefix`, by content, by path."""
        commits = (checked_commit(left), checked_commit(right))
        what = f"compare {left[:12]} with {right[:12]}"
        return map(_change, self._pages(what, self.client.refs.diff_refs, *commits, prefix=prefix, type="two_dot"))

    # ---- writes

    def write(
        self,
        branch: str,
        prefix: str,
        files: Mapping[str, Blob],
        *,
        message: str,
        metadata: Mapping[str, str],
        keep: Sequence[str] = (),
        replace: bool = True,
    ) -> Written:
        """One commit on `branch` after which `prefix` holds exactly `files`; see Placement for `keep` and `replace`.

        The blobs must be in the store already: lakeFS only links them. Repeating a write changes nothing and returns the
        commit that holds it. Raises Conflict when other writers of the same paths won every time, Uncommitted when
        somebody staged objects on `branch`, NotFound for an unknown branch.
        """
        placement = Placement(prefix, files, tuple(keep), replace)
        return self.write_all(branch, [placement], message=message, metadata=metadata)

    def write_all(self, branch: str, placements: Iterable[Placement], *, message: str, metadata: Mapping[str, str]) -> Written:
        """`write` for several prefixes in one commit: all of them or none."""
        return Transaction(self, checked_branch(branch), separate(placements), message, checked_metadata(metadata)).run()

    def clean(self, owner: str | None = None, older_than: float = DEFAULT_AGE) -> Sequence[str]:
        """Remove transactions that a dead writer left: those of `owner` (None: of anybody) older than `older_than` seconds."""
        return clean(self, owner, older_than)

    # ---- data that other tools staged

    def uncommitted(self, branch: str) -> Iterator[str]:
        """Paths staged on `branch` and not committed."""
        what = f"list the uncommitted objects of {branch!r}"
        return (change.path for change in self._pages(what, self.client.branches.diff_branch, checked_branch(branch)))

    def commit_staged(self, branch: str, message: str, metadata: Mapping[str, str]) -> str:
        """Commit what other tools staged on `branch`; the new commit id. NothingToCommit when nothing is staged."""
        reserved = next((path for path in self.uncommitted(branch) if path.startswith("_lakefs")), None)
        if reserved is not None:
            raise Refused(f"{reserved!r} is staged on {branch!r}: data may not be a lakeFS hook; delete it there, then commit again")
        mark = secrets.token_hex(8)

        def settled() -> str | None:
            head = self.commit_info(branch)
            return head.id if head.metadata.get(STAGED_BY) == mark else None

        try:
            return self.commit(branch, message, {**metadata, STAGED_BY: mark}, settled)
        except NothingToCommit:
            if (done := settled()) is not None:
                return done
            raise

    def commit(self, branch: str, message: str, metadata: Mapping[str, str], settled: Callable[[], str | None]) -> str:
        """Commit what is staged on `branch`; `settled` finds the commit of an attempt whose answer was lost."""
        creation = CommitCreation(message=message, metadata=checked_metadata(metadata))

        def send(**options: Any) -> str:
            return str(self.client.commits.commit(self.repository, branch, creation, **options).id)

        return str(self.client.call(f"commit to {branch!r}", send, slow=True, settled=settled))

    # ---- names that stay

    def tag(self, name: str, commit: str) -> None:
        """Tag `name` points to `commit` afterwards; Conflict when it points elsewhere, because tags never move here."""
        creation = TagCreation(id=checked_tag(name), ref=checked_commit(commit))
        try:
            self._call(f"make tag {name!r}", self.client.tags.create_tag, creation)
        except Conflict:
            there = self.tagged(name)
            if there != commit:
                raise Conflict(f"tag {name!r} already names {there[:12]}, not {commit[:12]}; tags never move: use another name") from None

    def tagged(self, name: str) -> str:
        """The commit id of a tag."""
        return str(self._call(f"find tag {name!r} of {self.repository!r}", self.client.tags.get_tag, checked_tag(name)).commit_id)

    def pin(self, name: str, commit: str) -> None:
        """A hidden branch pin-<name> keeps `commit` alive: lakeFS garbage collection looks at branches only, not at tags."""
        there = self.ensure_branch(f"pin-{name}", checked_commit(commit), hidden=True)
        if there != commit:
            raise Conflict(f"pin {name!r} already keeps {there[:12]}, not {commit[:12]}; unpin it first, or use another name")

    def unpin(self, name: str) -> None:
        """There is no such pin afterwards."""
        self.delete_branch(f"pin-{name}")

    # ---- calls

    def _call(self, what: str, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        return self.client.call(what, function, self.repository, *arguments, **options)

    def _pages(
        self, what: str, function: Callable[..., Any], *arguments: Any, after: str = "", amount: int = PAGE, **options: Any
    ) -> Iterator[Any]:
        while True:
            page = self._call(what, function, *arguments, after=after, amount=amount, **options)
            yield from page.results
            if not page.pagination.has_more:
                return
            after = page.pagination.next_offset


def _entry(stats: ObjectStats) -> Entry:
    return Entry(stats.path, stats.size_bytes or 0, stats.checksum, stats.physical_address, stats.content_type or "")


def _change(diff: Any) -> Change:
    return Change(diff.path, diff.type)


def _commit_info(commit: Commit) -> CommitInfo:
    return CommitInfo(commit.id, commit.message, dict(commit.metadata or {}), commit.creation_date, tuple(commit.parents))
