"""Which failures a person meets in a terminal as one message and an exit code, rather than as a traceback."""

import msgspec

FINDING, WRONG_USE, UNREACHABLE = 1, 2, 3


class Failure(Exception):
    """A failure with its exit code."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


def _types() -> dict[int, tuple[type[BaseException], ...]]:
    """Imported here because `repro --help` should not wait for the clients."""
    from repro_assets.basemodel import BaseModelError
    from repro_assets.bundling import BundleRefused
    from repro_assets.data.errors import DataError
    from repro_assets.documents import DocumentError
    from repro_assets.evaluation.policy import PolicyError
    from repro_assets.importing import CannotImport
    from repro_assets.recipe import RecipeError
    from repro_assets.releases import ReleaseError
    from repro_assets.reproducing import CannotReproduce
    from repro_assets.running import UnknownAsset
    from repro_assets.services import UiError
    from repro_assets.shelf import MissingDocument, UncommittedRaw
    from repro_assets.trust.blob import BlobError
    from repro_assets.trust.verification import Refused, TrustError
    from resources.errors import Denied, NotFound, StorageError, Unavailable
    from resources.servers import ServerError
    from resources.settings import SettingsError
    from resources.signer import KeyProblem

    return {
        WRONG_USE: (RecipeError, SettingsError, MissingDocument, UncommittedRaw, CannotImport, UnknownAsset, ReleaseError, PolicyError, KeyProblem, TrustError, ValueError),
        UNREACHABLE: (Unavailable, Denied, NotFound, ServerError, UiError, OSError),
        FINDING: (BlobError, DataError, DocumentError, BundleRefused, BaseModelError, CannotReproduce, Refused, StorageError, msgspec.MsgspecError),
    }


EXIT = Exception


def explained(error: BaseException) -> tuple[int, str]:
    """Exit code and message of a known failure; an unknown one is raised again with its traceback."""
    for code, types in _types().items():
        if isinstance(error, types):
            return code, str(error)
    raise error
