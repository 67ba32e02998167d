"""Dagster's view of the resources: thin, lazy wrappers around lakeFS, S3, keys, the GPU executor, the notifier and the recipe.

The clients themselves are in `resources/` and know no Dagster. A wrapper connects on first use, so that loading the definitions
neither needs a server nor takes time.
"""

import getpass
import os
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

import dagster as dg
from pydantic import Field

from repro_assets import recipe as recipes
from repro_assets.recipe import Loaded
from resources.settings import Connections, home_folder

if TYPE_CHECKING:
    from resources.blobs import Blobs, Objects
    from resources.gpu.executor import Executor
    from resources.lake import Lake
    from resources.notifier import Notifier
    from resources.signer import Signer

DEMO = Path(__file__).parent / "recipes" / "demo.yaml"


class LakeResource(dg.ConfigurableResource):
    """The lakeFS repository that holds every document: REPRO_REPOSITORY at LAKECTL_SERVER_ENDPOINT_URL, else the embedded server."""

    @cached_property
    def connections(self) -> Connections:
        return Connections.from_environment()

    @cached_property
    def client(self) -> "Lake":
        from resources.lake import Lake

        return Lake.connect(self.connections)

    def link(self, ref: str, folder: str, name: str = "") -> str:
        """The page of lakeFS's own UI that shows the folder, or the file `name` in it, at `ref`."""
        where = self.connections
        view = "object" if name else "objects"
        return f"{where.lakefs_endpoint}/repositories/{where.repository}/{view}?ref={quote(ref)}&path={quote(folder)}/{quote(name)}"


class BlobsResource(dg.ConfigurableResource):
    """The S3 bucket of content-addressed blobs, with a local read-through cache."""

    @cached_property
    def store(self) -> "Blobs":
        from resources.blobs import Blobs

        return Blobs.connect(Connections.from_environment())


class JobsResource(dg.ConfigurableResource):
    """The S3 bucket of jobs and memo entries."""

    @cached_property
    def objects(self) -> "Objects":
        from resources.blobs import Objects

        return Objects.connect(Connections.from_environment())


class ExecutorResource(dg.ConfigurableResource):
    """Runs training and scoring jobs. `ranks`: processes a job may use on this machine, one a GPU."""

    ranks: int = Field(
        default=0, ge=0, description="processes of a training job; 0 = REPRO_RANKS, else one a GPU. Never part of an identity"
    )

    def executor(self) -> "Executor":
        from resources.gpu import Executor

        return Executor.local(Connections.from_environment())

    def world(self) -> int:
        return self.ranks or int(os.environ.get("REPRO_RANKS", "0"))


class KeysResource(dg.ConfigurableResource):
    """Signing keys by role and the trust configuration: REPRO_TRUST and key URIs, else local keys made once under the home folder."""

    @cached_property
    def by_role(self) -> "Signer":
        from resources.signer import Signer

        return Signer.connect(home_folder())


class NotifierResource(dg.ConfigurableResource):
    """Where a decision that is not a promotion is announced: REPRO_NOTIFY, else a file under the home folder."""

    @cached_property
    def notifier(self) -> "Notifier":
        from resources.notifier import connect

        return connect(home_folder())


class RecipeResource(dg.ConfigurableResource):
    """One recipe for all assets of a run: `path` here, else REPRO_RECIPE, else the demo's. The name of a shipped one does too."""

    path: str = Field(default="", description="recipe file, or name of a shipped one; empty = REPRO_RECIPE, else the demo recipe")

    def load(self) -> Loaded:
        wanted = self.path or os.environ.get("REPRO_RECIPE") or str(DEMO)
        return recipes.load(recipes.shipped(wanted) or wanted)


class Bench(dg.ConfigurableResource):
    """Everything an asset may need, in one place."""

    lake: dg.ResourceDependency[LakeResource]
    blobs: dg.ResourceDependency[BlobsResource]
    jobs: dg.ResourceDependency[JobsResource]
    gpu: dg.ResourceDependency[ExecutorResource]
    trust: dg.ResourceDependency[KeysResource]
    notices: dg.ResourceDependency[NotifierResource]
    recipe: dg.ResourceDependency[RecipeResource]

    @classmethod
    def outside_a_run(cls, recipe: str = "") -> "Bench":
        """The same resources for a command or a test; `recipe` as RecipeResource takes it."""
        return cls(
            lake=LakeResource(),
            blobs=BlobsResource(),
            jobs=JobsResource(),
            gpu=ExecutorResource(),
            trust=KeysResource(),
            notices=NotifierResource(),
            recipe=RecipeResource(path=recipe),
        )

    @property
    def objects(self) -> "Objects":
        return self.jobs.objects

    @property
    def signing(self) -> "Signer":
        return self.trust.by_role

    @property
    def notifier(self) -> "Notifier":
        return self.notices.notifier

    @property
    def actor(self) -> str:
        """Who started this process, for commit metadata; lakeFS itself knows one user only."""
        return os.environ.get("REPRO_ACTOR") or getpass.getuser()

    @property
    def ui_url(self) -> str:
        return os.environ.get("REPRO_UI_URL", "").rstrip("/")
