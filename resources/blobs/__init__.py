"""S3 behind one door: `Blobs` (content-addressed, verified) and `Objects` (plain keys). Nothing of boto3 leaves this package."""

from resources.blobs.cache import Cache
from resources.blobs.objects import Objects
from resources.blobs.s3 import make_client
from resources.blobs.store import Blobs, address

__all__ = ["Blobs", "Cache", "Objects", "address", "make_client"]
