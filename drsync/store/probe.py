"""Find out whether a store keeps the promise that everything stands on: create never overwrites."""

import threading
from concurrent.futures import ThreadPoolExecutor

from drsync.errors import ObjectExists, StoreError, StoreUnsafe
from drsync.store import Bytes, ObjectStore


def probe_create_only(store: ObjectStore, key: str, body: Bytes, sha256: bytes) -> None:
    """Try to create an object that exists, and expect to be refused.

    `key` and `body` are of an object that exists, such as repo.json; if the store
    does overwrite it, then with the bytes that it has. `store` must be the store
    itself, not a RetryingStore around it: that one takes equal bytes for its own success.

    Raises:
        StoreUnsafe: the store took it; no point may be written there.
    """
    try:
        store.create(key, body, sha256=sha256)
    except ObjectExists:
        return
    raise StoreUnsafe(url=store.url)


def create_in_a_race(store: ObjectStore, key: str, body: Bytes, sha256: bytes, *, racers: int = 8) -> None:
    """Create an object by several threads at once, and expect exactly one of them to succeed.

    There are stores that refuse a second create only if the first one is long
    done (SeaweedFS up to 4.16, its issue 8800): probe_create_only can't tell. All
    racers bring the same bytes, so the object is right whoever wins. `store` must
    be the store itself, as above.

    Raises:
        ObjectExists: nobody succeeded, the key was taken before.
        StoreUnsafe: several succeeded; no point may be written there.
        StoreError: nobody succeeded, for this reason.
    """
    together = threading.Barrier(racers)

    def create(_: int) -> StoreError | None:
        together.wait()
        try:
            store.create(key, body, sha256=sha256)
        except StoreError as err:  # a loser's: the key is taken, or (409) just being taken
            return err
        return None

    with ThreadPoolExecutor(racers) as pool:
        errors = [err for err in pool.map(create, range(racers)) if err is not None]
    if len(errors) < racers - 1:
        raise StoreUnsafe(url=store.url)
    if len(errors) == racers:
        raise next((err for err in errors if not isinstance(err, ObjectExists)), errors[0])
