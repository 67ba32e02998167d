"""Real ed25519 keys, one a role, and a trust configuration that knows them. Key files and URIs are tested in resources/."""

import pytest
from securesystemslib.signer import CryptoSigner

from repro_assets.trust.signing import ROLES, public_key
from repro_assets.trust.verification import Trust


@pytest.fixture(scope="session")
def keys() -> dict[str, CryptoSigner]:
    """Role -> key, and `stranger`, which nobody trusts."""
    return {role: CryptoSigner.generate_ed25519() for role in (*ROLES, "stranger")}


@pytest.fixture(scope="session")
def trust(keys: dict[str, CryptoSigner]) -> Trust:
    return Trust(1, dict(public_key(keys[role], (role,), name=f"the {role}") for role in ROLES))
