"""How much our blob store costs beside plain boto3 with the same threads: 1,000 blobs of 20 kB put and got, on a server of its own.

Run by hand: `python -m repro_assets_tests.benchmarks.blobs`. Prints seconds and ratios; exits 1 when a ratio is above 1.3.
"""

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import boto3
from botocore.config import Config

from resources.blobs import Blobs
from resources.blobs.store import THREADS
from resources.servers import down, up
from resources.settings import Connections

COUNT, SIZE, ROUNDS, LIMIT = 1_000, 20_000, 5, 1.3


def plain(connections: Connections) -> tuple[Callable[[list[bytes]], list[str]], Callable[[list[str]], list[bytes]]]:
    """put and get with nothing but boto3 and a thread pool."""
    client = boto3.client(
        "s3",
        endpoint_url=connections.s3_endpoint,
        region_name=connections.s3_region,
        aws_access_key_id=connections.s3_access_key,
        aws_secret_access_key=connections.s3_secret_key,
        config=Config(s3={"addressing_style": "path"}, max_pool_connections=32, proxies={}),
    )

    def put(items: list[bytes]) -> list[str]:
        names = [f"plain/{os.urandom(16).hex()}" for _ in items]
        with ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(lambda name, data: client.put_object(Bucket=connections.jobs_bucket, Key=name, Body=data), names, items))
        return names

    def get(names: list[str]) -> list[bytes]:
        with ThreadPoolExecutor(THREADS) as pool:
            return list(pool.map(lambda name: client.get_object(Bucket=connections.jobs_bucket, Key=name)["Body"].read(), names))

    return put, get


def timed(seconds: list[float], function: Callable[..., list], argument: list) -> list:  # type: ignore[type-arg]
    began = time.perf_counter()
    result = function(argument)
    seconds.append(time.perf_counter() - began)
    return result


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder) / ".repro"
        try:
            connections = up(home)
            ours = Blobs.connect(connections).without_cache()
            put, get = plain(connections)
            seconds: dict[str, list[float]] = {name: [] for name in ("plain put", "our put", "plain get", "our get")}
            put([b"warm"]), ours.put_bytes(b"warm")
            for turn in range(ROUNDS):
                # Alternating order: neither side always meets the colder server.
                for side in ("plain", "our") if turn % 2 else ("our", "plain"):
                    items = [os.urandom(SIZE) for _ in range(COUNT)]
                    if side == "plain":
                        names = timed(seconds["plain put"], put, items)
                        got = timed(seconds["plain get"], get, names)
                    else:
                        stored = timed(seconds["our put"], ours.put_many, items)
                        got = timed(seconds["our get"], lambda names: list(ours.get_many(names)), [blob.sha256 for blob in stored])
                    if got != items:
                        raise SystemExit(f"{side} gave other bytes back than were put")
        finally:
            down(home)
    middle = {name: statistics.median(values) for name, values in seconds.items()}
    ratios = {verb: middle[f"our {verb}"] / middle[f"plain {verb}"] for verb in ("put", "get")}
    print(f"{COUNT:,} blobs of {SIZE:,} bytes, {THREADS} threads, median of {ROUNDS} rounds")
    for verb, ratio in ratios.items():
        print(f"{verb}: ours {middle[f'our {verb}']:.2f} s, boto3 {middle[f'plain {verb}']:.2f} s, ratio {ratio:.2f} (at most {LIMIT})")
    return int(max(ratios.values()) > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
