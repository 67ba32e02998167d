"""One write to a branch: all of it or nothing, whoever else writes and wherever the process dies.

A hidden branch tx-<owner>-<time>-<random> is made from the target's head, filled, committed and merged; the merge is the
only step that others see. Nothing here knows what an asset is.
"""

import contextlib
import logging
import re
import secrets
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Final

import msgspec
from lakefs_sdk.models.branch_creation import BranchCreation
from lakefs_sdk.models.merge import Merge
from lakefs_sdk.models.path_list import PathList
from lakefs_sdk.models.staging_location import StagingLocation
from lakefs_sdk.models.staging_metadata import StagingMetadata

from repro_assets.trust.blob import Blob
from resources.errors import Conflict, NotFound, NothingToCommit, StorageError, Unavailable
from resources.lake.values import CHECKSUM, Placement, Written, common_start, content_type

if TYPE_CHECKING:
    from resources.lake.lake import Lake

log = logging.getLogger(__name__)

TRANSACTION: Final = "transaction"  # metadata key of the commit on the target: finds a merge whose answer was lost
NAME: Final = re.compile(r"tx-(?P<owner>\w+)-(?P<created>\d+)-(?P<token>[0-9a-f]{12})", re.ASCII)
REBUILDS: Final = 20
LINKS: Final = 16  # threads
DELETES: Final = 1000  # paths a call, the server's limit
DEFAULT_AGE: Final = 6 * 3600.0  # seconds; no honest write takes that long


class Plan(msgspec.Struct, frozen=True):
    """What turns one commit's tree into the wanted one. Nothing to do means that the tree is as wanted."""

    link: dict[str, Blob]
    remove: list[str]

    def __bool__(self) -> bool:
        return bool(self.link or self.remove)


class Transaction:
    """The wanted state of some prefixes of one branch, and the steps that bring it about."""

    def __init__(self, lake: "Lake", branch: str, placements: tuple[Placement, ...], message: str, metadata: dict[str, str]) -> None:
        self.lake, self.branch, self.placements = lake, branch, placements
        self.message, self.metadata = message, metadata

    def run(self) -> Written:
        """Attempts from ever newer heads until the branch holds what is wanted."""
        for attempt in range(1, REBUILDS + 1):
            base = self.lake.head(self.branch)
            plan = self.plan(base)
            if not plan:
                return Written(self._last_touched(base), created=False)
            merged = self._attempt(base, plan)
            # Without a file in common lakeFS merges two writers of one prefix into a mixture: seen here, mended by another turn.
            if merged is not None and not self.plan(merged):
                return Written(merged, created=True)
            time.sleep(self.lake.client.patience.wait(attempt))
        raise Conflict(
            f"{REBUILDS} times somebody else changed {self._names()} of branch {self.branch!r} during this write; nothing of it is left "
            "behind. Find who writes there (`lakectl log`), then write again"
        )

    def plan(self, commit: str) -> Plan:
        """What `commit` lacks and what it holds too much."""
        link: dict[str, Blob] = {}
        remove: list[str] = []
        for placement in self.placements:
            wanted = placement.wanted()
            link |= wanted
            for entry in self._present(commit, placement, wanted):
                if entry.path in wanted:
                    if entry.holds(wanted[entry.path]):
                        del link[entry.path]
                elif placement.owns(entry.path):
                    remove.append(entry.path)
        return Plan(link, remove)

    def _present(self, commit: str, placement: Placement, wanted: dict[str, Blob]) -> Iterator[Any]:
        if placement.replace:
            yield from self.lake.list(commit, placement.root)
        elif wanted:
            last = max(path.encode() for path in wanted)
            for entry in self.lake.list(commit, common_start(wanted)):
                if entry.path.encode() > last:
                    return
                yield entry

    def _attempt(self, base: str, plan: Plan) -> str | None:
        """The commit on the target, or None when somebody else was faster or removed this transaction."""
        name = f"tx-{self.lake.owner}-{int(time.time())}-{secrets.token_hex(6)}"
        merged = None
        try:
            self._begin(name, base)
            self._link(name, plan.link)
            self._remove(name, plan.remove)
            self._commit(name, base)
            merged = self._merge(name, base)
        except (Conflict, NothingToCommit) as error:
            log.info("write to %s: %s; starting again from the new head", self.branch, error)
        except NotFound:
            if self.lake.exists(name):
                raise
            log.info("transaction %s was removed by somebody; starting again", name)
        finally:
            self._discard(name, attempts=None if merged else 1)
        return merged

    def _begin(self, name: str, base: str) -> None:
        creation = BranchCreation(name=name, source=base, hidden=True)
        lake = self.lake
        with contextlib.suppress(Conflict):  # the name is random: it exists because the answer to an earlier attempt was lost
            lake.client.call(f"begin {name!r}", lake.client.branches.create_branch, lake.repository, creation)

    def _link(self, name: str, files: dict[str, Blob]) -> None:
        client, repository = self.lake.client, self.lake.repository

        def one(item: tuple[str, Blob]) -> None:
            path, blob = item
            metadata = StagingMetadata(
                staging=StagingLocation(physical_address=self.lake.address(blob)),
                checksum=CHECKSUM + blob.sha256,
                size_bytes=blob.size,
                content_type=content_type(path),
                mtime=0,  # the time of linking would make equal trees differ
            )
            client.call(f"link {path!r}", client.staging.link_physical_address, repository, name, path, metadata)

        if len(files) < 3:
            for item in files.items():
                one(item)
            return
        with ThreadPoolExecutor(min(LINKS, len(files)), thread_name_prefix="link") as threads:
            try:
                for _ in threads.map(one, files.items()):
                    pass
            except BaseException:
                threads.shutdown(wait=False, cancel_futures=True)
                raise

    def _remove(self, name: str, paths: list[str]) -> None:
        client, repository = self.lake.client, self.lake.repository
        for start in range(0, len(paths), DELETES):
            batch = PathList(paths=paths[start : start + DELETES])
            answer = client.call(f"remove {batch.paths[0]!r} and others", client.objects.delete_objects, repository, name, batch)
            # A refused path comes back inside a successful answer.
            for error in answer.errors or []:
                reason = f"{error.message} ({error.status_code})"
                raise Unavailable(f"lakeFS at {client.endpoint} did not remove {error.path!r}: {reason}; write again")

    def _commit(self, name: str, base: str) -> None:
        def settled() -> str | None:
            tip = self.lake.head(name)
            return tip if tip != base else None

        self.lake.commit(name, self.message, self.metadata, settled)

    def _merge(self, name: str, base: str) -> str | None:
        lake = self.lake
        # One parent: one write is one commit on the branch, and lakeFS's log by prefix leaves out commits with two. The price:
        # a merge that arrives twice at the same moment adds a commit that changes nothing.
        merge = Merge(message=self.message, metadata={**self.metadata, TRANSACTION: name}, squash_merge=True)

        def send(**options: Any) -> str:
            return str(lake.client.refs.merge_into_branch(lake.repository, name, self.branch, merge, **options).reference)

        def settled() -> str | None:
            for commit in lake.log(self.branch):
                if commit.id == base:
                    return None
                if commit.metadata.get(TRANSACTION) == name:
                    return commit.id
            return None

        try:
            return str(lake.client.call(f"merge {name!r} into {self.branch!r}", send, slow=True, settled=settled))
        except (Conflict, NothingToCommit):
            # Also the answer to a repeated merge: the first one took effect, and a later writer may have changed the paths since.
            if (done := settled()) is not None:
                return done
            raise

    def _last_touched(self, commit: str) -> str:
        lake = self.lake
        prefixes = [placement.root or common_start(placement.wanted()) for placement in self.placements]
        what = f"find the last change of {self._names()} at {commit[:12]}"
        options: dict[str, Any] = {"prefixes": prefixes} if all(prefixes) else {}
        page = lake.client.call(
            what, lake.client.refs.log_commits, lake.repository, commit, amount=1, limit=True, first_parent=True, slow=True, **options
        )
        return str(page.results[0].id) if page.results else commit

    def _names(self) -> str:
        return ", ".join(repr(placement.root) for placement in self.placements)

    def _discard(self, name: str, attempts: int | None) -> None:
        try:
            self.lake.delete_branch(name, attempts=attempts)
        except StorageError as error:
            log.warning("transaction branch %s stays behind until lake.clean() removes it: %s", name, error)


def clean(lake: "Lake", owner: str | None, older_than: float) -> list[str]:
    """See Lake.clean. Age is by the name, that is by the writer's clock: the branch itself carries no time of its own."""
    slug = None if owner is None else re.sub(r"\W+", "_", owner, flags=re.ASCII)[:60]
    removed = []
    for name, _ in list(lake.branches("tx-", hidden=True)):
        match = NAME.fullmatch(name)
        if match and slug in (None, match["owner"]) and time.time() - int(match["created"]) >= older_than:
            lake.delete_branch(name)
            removed.append(name)
    return removed
