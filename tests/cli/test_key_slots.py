"""`drsync key list, add, remove, rotate, export, recover`: what opens the repository, and what hosts hold."""

import json
import os
import re
import stat
from pathlib import Path

import pytest
from command_line import Cli
from fake_clock import FakeClock
from shipped_vm import DiskStep, ShippedVm, Step

from drsync.beating import Beating
from drsync.config import load_config
from drsync.format.keys import RootKeys
from drsync.keyfile import read_key_file
from drsync.log import Log
from drsync.repository import open_repository
from drsync.session import Session
from drsync.store.directory import DirectoryStore

KEY = r"(?:[A-Z2-7]{4}-){13}[A-Z2-7]{4}"
PHRASE = "six words that nobody can guess"
MIB = 1024 * 1024


@pytest.fixture
def recovery(cli: Cli) -> str:
    """The recovery key of a new repository."""
    return str(cli.ok("init", "--json").json["recovery_key"])


def listed(cli: Cli) -> dict[str, str]:
    return {slot["name"]: slot["kind"] for slot in cli.ok("key", "list", "--json").json["slots"]}


def shipped(cli: Cli, place: Path, *, vm: str = "web", of: ShippedVm | None = None) -> ShippedVm:
    """A point of a VM in the repository of `cli`, made under the newest key of its key file."""
    store = DirectoryStore(cli.repository)
    keys = read_key_file(cli.key_file)
    place.mkdir(exist_ok=True)
    repository = open_repository(store, keys, cli.key_file)
    made = of or ShippedVm(place, repository=repository, vm=vm)
    made.log = Log(repository.vm(vm))
    return made.run([Step(disks={"root": DiskStep(size_bytes=MIB, writes={len(made.points): 3})})])


def test_a_new_repository_has_one_slot_and_generation_1(cli: Cli, recovery: str) -> None:
    document = cli.ok("key", "list", "--json").json
    assert (document["generation"], document["ring"]) == (1, 0)
    assert listed(cli) == {"recovery": "recovery"}
    assert document["key_file"] == {"generation": 1, "vms": None}
    shown = cli.ok("key", "list").stdout
    assert "the recovery key" in shown
    assert f"{cli.key_file} has the root key" in shown
    assert recovery not in shown


def test_list_needs_no_key_file(cli: Cli, recovery: str) -> None:
    cli.key_file.unlink()
    assert cli.ok("key", "list", "--json").json["key_file"] is None
    assert f"{cli.key_file} can't be read" in cli.ok("key", "list").stdout


def test_a_second_recovery_key_is_printed_once_and_opens(cli: Cli, recovery: str) -> None:
    done = cli.ok("key", "add", "recovery", "--name", "safe", stdin=recovery)
    (second,) = re.findall(KEY, done.stdout)
    assert "added slot safe; the repository has recovery, safe" in done.stdout
    before = cli.key_file.read_bytes()
    cli.key_file.unlink()
    cli.ok("key", "recover", stdin=second)
    assert cli.key_file.read_bytes() == before
    assert all(second.encode() not in path.read_bytes() for path in cli.place.rglob("*") if path.is_file())


def test_a_passphrase_from_a_file_a_descriptor_or_stdin(cli: Cli, recovery: str) -> None:
    phrase = cli.place / "phrase"
    phrase.write_text(PHRASE + "\n")
    _, remedy = cli.refused(26, "key", "add", "passphrase", "--passphrase-file", str(phrase), stdin=recovery)
    assert remedy == f"chmod 600 {phrase}"
    phrase.chmod(0o600)
    cli.ok("key", "add", "passphrase", "--name", "ops", "--passphrase-file", str(phrase), stdin=recovery)
    cli.key_file.unlink()
    cli.ok("key", "recover", stdin=PHRASE + "\n")
    reading, writing = os.pipe()
    os.write(writing, PHRASE.encode())
    os.close(writing)
    done = cli.ok("key", "rotate", "--secret-fd", str(reading), "--json").json
    assert (done["generation"], done["slots"]) == (2, ["recovery", "ops"])
    cli.ok("key", "rotate", "--secret-file", str(phrase))
    assert len(cli.key_file.read_text().splitlines()) == 3


def test_the_secret_that_is_there_comes_before_the_new_passphrase(cli: Cli, recovery: str) -> None:
    cli.ok("key", "add", "passphrase", stdin=f"{recovery}\n{PHRASE}\n")
    assert listed(cli) == {"recovery": "recovery", "passphrase": "passphrase"}
    cli.ok("key", "rotate", "--unlock", "passphrase", stdin=PHRASE)
    assert cli.ok("key", "list", "--json").json["generation"] == 2


def test_a_short_passphrase_is_refused_with_what_would_do(cli: Cli, recovery: str) -> None:
    error, remedy = cli.refused(17, "key", "add", "passphrase", stdin=f"{recovery}\nelevenchars\n")
    assert error == "the passphrase can't be used: it has 11 characters, fewer than 12"
    assert "12 characters or more" in remedy
    assert listed(cli) == {"recovery": "recovery"}


def test_what_does_not_open_is_named(cli: Cli, recovery: str) -> None:
    wrong = recovery[:-1] + ("A" if recovery[-1] != "A" else "B")
    error, _ = cli.refused(27, "key", "rotate", stdin=wrong)
    assert error.startswith("the recovery key does not open the repository at file://")
    assert "typing error" in error
    cli.ok("key", "add", "passphrase", stdin=f"{recovery}\n{PHRASE}\n")
    error, remedy = cli.refused(27, "key", "rotate", stdin="not the passphrase at all")
    assert error.startswith("the passphrase does not open")
    assert remedy.startswith("drsync key list")
    error, _ = cli.refused(27, "key", "rotate", stdin=wrong)
    assert "typing error" in error, "a mistyped recovery key is not taken for a passphrase"
    error, _ = cli.refused(15, "key", "rotate", "--unlock", "nobody", stdin=recovery)
    assert error == "the repository has no slot nobody to unlock with; it has recovery, passphrase"


def test_slots_are_removed_but_the_last_recovery_slot(cli: Cli, recovery: str) -> None:
    error, remedy = cli.refused(16, "key", "remove", "recovery", stdin=recovery)
    assert error == "recovery is the last recovery slot, which can't be removed"
    assert remedy.startswith("drsync key add recovery")
    second = cli.ok("key", "add", "recovery", "--json", stdin=recovery).json
    assert second["slot"] == "recovery-2"
    cli.ok("key", "remove", "recovery", stdin=second["recovery_key"])
    assert listed(cli) == {"recovery-2": "recovery"}
    error, _ = cli.refused(27, "key", "rotate", stdin=recovery)
    assert "no slot of ring 2 takes it" in error
    assert cli.refused(15, "key", "remove", "recovery", stdin=second["recovery_key"])
    assert cli.refused(19, "key", "add", "recovery", "--name", "recovery-2", stdin=second["recovery_key"])


def test_dry_runs_open_and_write_nothing(cli: Cli, recovery: str) -> None:
    def everything() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in cli.place.rglob("*") if path.is_file()}

    before = everything()
    cli.ok("key", "rotate", "--dry-run", stdin=recovery)
    done = cli.ok("key", "add", "recovery", "--dry-run", stdin=recovery)
    assert "would add slot recovery-2" in done.stdout
    assert not re.findall(KEY, done.stdout)
    assert "recovery_key" not in cli.ok("key", "add", "recovery", "--dry-run", "--json", stdin=recovery).json
    cli.ok("key", "export", "web", "--output", str(cli.place / "web.key"), "--dry-run")
    cli.refused(27, "key", "rotate", "--dry-run", stdin="")
    assert everything() == before


def test_rotate_gives_new_points_a_new_key_and_the_old_ones_stay(cli: Cli, recovery: str, tmp_path: Path) -> None:
    vm = shipped(cli, tmp_path / "layers")
    done = cli.ok("key", "rotate", stdin=recovery)
    assert "made the key of generation 2, opened by recovery" in done.stdout
    assert f"{cli.key_file} has it" in done.stdout
    shipped(cli, tmp_path / "layers", of=vm)
    assert [point["point"] for point in cli.ok("points", "web", "--json").json] == [1, 2]
    assert cli.ok("verify", "--read-data", "--json").json[0]["problems"] == []
    for point in (1, 2):
        cli.ok("restore", "web", "--to", "image", "--output", str(tmp_path / str(point)), "--point", str(point))
    cli.key_file.unlink()
    cli.ok("key", "recover", stdin=recovery)
    assert cli.ok("verify", "--read-data", "--json").json[0]["problems"] == []


def test_another_host_is_told_of_the_rotation_and_goes_on(cli: Cli, recovery: str, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    other = Cli(tmp_path / "other")
    text = other.config.read_text().replace(str(other.repository), str(cli.repository))
    other.config.write_text(text)
    other.key_file.write_bytes(cli.key_file.read_bytes())
    other.key_file.chmod(0o600)
    vm = shipped(cli, tmp_path / "layers")
    assert "rotated" not in other.ok("status").stderr
    cli.ok("key", "rotate", stdin=recovery)
    told = other.ok("status").stderr
    assert "the repository's key was rotated: it is of generation 2" in told
    assert "drsync key recover" in told
    shipped(cli, tmp_path / "layers", of=vm)
    error, remedy = other.refused(28, "points", "web")
    assert error == f"the key file {other.key_file} has no key of generation 2 of VM web; it has those up to 1"
    assert "drsync key recover" in remedy
    other.ok("key", "recover", stdin=recovery)
    assert other.key_file.read_bytes() == cli.key_file.read_bytes()
    other.ok("points", "web")
    assert "rotated" not in other.ok("status").stderr


def test_a_rotation_that_a_crash_cut_off_is_ended_by_the_same_command(cli: Cli, recovery: str) -> None:
    before = cli.key_file.read_bytes()
    cli.ok("key", "rotate", stdin=recovery)
    cli.key_file.write_bytes(before)
    done = cli.ok("key", "rotate", stdin=recovery)
    assert "no new key: generation 2 is there (it was made before, and this host lacked it)" in done.stdout
    assert read_key_file(cli.key_file).newest == 2
    assert cli.ok("key", "rotate", "--json", stdin=recovery).json["generation"] == 3


def test_export_gives_a_host_its_own_vms_and_every_command_keeps_to_them(
    cli: Cli, recovery: str, tmp_path: Path
) -> None:
    shipped(cli, tmp_path / "web")
    shipped(cli, tmp_path / "db", vm="db")
    output = tmp_path / "host.key"
    done = cli.ok("key", "export", "web", "new", "--output", str(output), "--json")
    assert done.json == {"key_file": str(output), "vms": ["new", "web"], "generation": 1, "dry_run": False}
    assert "nothing of new is in the repository yet" in done.stderr
    assert stat.S_IMODE(output.stat().st_mode) == 0o600
    root = read_key_file(cli.key_file)
    assert isinstance(root, RootKeys)
    assert root.generations[0].secret.hex() not in output.read_text()

    cli.key_file.unlink()
    output.rename(cli.key_file)
    assert cli.ok("key", "list", "--json").json["key_file"] == {"generation": 1, "vms": ["new", "web"]}
    points = cli.ok("points", "--json")
    assert {point["vm"] for point in points.json} == {"web"}
    assert "left out, since this host has no key of them: db" in points.stderr
    assert {row["vm"] for row in cli.ok("status", "--json").json} == {"web"}
    assert [row["vm"] for row in cli.ok("verify", "--read-data", "--json").json] == ["web"]
    cli.ok("restore", "web", "--to", "image", "--output", str(tmp_path / "out"))
    lacks = f"the key file {cli.key_file} has no key of VM db; it has keys of new, web alone"
    for words in (
        ["points", "db"],
        ["verify", "db"],
        ["restore", "db", "--to", "image", "--output", str(tmp_path / "no")],
        ["preflight", "db", "--to", "ec2"],
        ["key", "export", "db", "--output", str(tmp_path / "no.key")],
    ):
        error, remedy = cli.refused(28, *words)
        assert error == lacks, words
        assert remedy.startswith("drsync key export db --output FILE")
    cli.ok("key", "export", "web", "--output", str(tmp_path / "less.key"))
    assert not (tmp_path / "no").exists()


def test_a_configured_vm_without_a_key_is_told_in_its_place(cli: Cli, recovery: str, tmp_path: Path) -> None:
    shipped(cli, tmp_path / "web")
    output = tmp_path / "host.key"
    cli.ok("key", "export", "web", "--output", str(output))
    output.replace(cli.key_file)
    cli.configure({"db": tmp_path / "db.sock"})
    (db, web) = cli.ok("status", "--json").json
    assert (db["vm"], web["vm"]) == ("db", "web")
    assert "has no key of VM db" in db["error"]
    assert web["error"] is None
    cli.refused(28, "capture", "db")
    checks = {check["check"]: check["error"] for check in cli.run("config", "check", "--json").json["checks"]}
    assert checks["repository"] is None
    assert checks["vm db"]["class"] == "KeyMissing"


def test_a_key_file_of_vms_of_another_repository_is_refused(cli: Cli, recovery: str, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    other = Cli(tmp_path / "other")
    other.ok("init")
    output = tmp_path / "host.key"
    other.ok("key", "export", "web", "--output", str(output))
    output.replace(cli.key_file)
    for words in (["status"], ["key", "export", "web", "--output", str(tmp_path / "x")]):
        error, _ = cli.refused(23, *words)
        assert error == f"the key in {cli.key_file} does not open the repository at file://{cli.repository}"


def test_a_host_with_keys_of_vms_gets_newer_ones_by_a_slot_and_not_the_root_key(
    cli: Cli, recovery: str, tmp_path: Path
) -> None:
    output = tmp_path / "host.key"
    cli.ok("key", "export", "web", "--output", str(output))
    cli.ok("key", "rotate", stdin=recovery)
    output.replace(cli.key_file)
    done = cli.ok("key", "recover", stdin=recovery)
    assert "wrote the keys of its VMs" in done.stdout
    assert cli.ok("key", "list", "--json").json["key_file"] == {"generation": 2, "vms": ["web"]}


def test_export_refuses_a_file_that_exists_and_names_that_none_has(cli: Cli, recovery: str, tmp_path: Path) -> None:
    output = tmp_path / "host.key"
    output.write_text("precious")
    cli.refused(25, "key", "export", "web", "--output", str(output))
    assert output.read_text() == "precious"
    error, _ = cli.refused(2, "key", "export", "../web", "--output", str(tmp_path / "x"))
    assert "'../web' is no name of a VM" in error


def test_kms_needs_its_key_and_no_other_kind_does(cli: Cli, recovery: str) -> None:
    for words in (["kms"], ["recovery", "--kms-key", "x"]):
        error, _ = cli.refused(2, "key", "add", *words, stdin=recovery)
        assert "--kms-key names the key of a slot of KMS" in error


def test_an_older_ring_can_be_asked_for(cli: Cli, recovery: str) -> None:
    cli.ok("key", "rotate", stdin=recovery)
    (ring,) = (cli.repository / "keys").glob("ring-*")
    content = ring.read_bytes()
    ring.chmod(0o600)
    ring.write_bytes(content.replace(b'"sealed', b'"sealed')[:-10] + b"AAAAAAAAA\n")
    cli.key_file.unlink()
    error, _ = cli.refused(40, "key", "recover", stdin=recovery)
    assert ring.name in error
    assert cli.ok("key", "recover", "--ring", "0", "--json", stdin=recovery).json["generation"] == 1


def test_a_key_that_only_the_ring_has_is_nowhere_in_the_clear(cli: Cli, recovery: str) -> None:
    cli.ok("key", "rotate", stdin=recovery)
    held = read_key_file(cli.key_file)
    assert isinstance(held, RootKeys)
    stored = b"".join(path.read_bytes() for path in cli.repository.rglob("*") if path.is_file())
    for root in held.generations:
        assert root.secret not in stored
        assert root.secret.hex().encode() not in stored
    assert json.loads((next((cli.repository / "keys").glob("ring-*"))).read_bytes().split(b"\n")[0])["number"] == 1


def test_the_daemon_warns_of_a_rotation_at_its_first_heartbeat_and_once_an_hour(
    cli: Cli, recovery: str, caplog: pytest.LogCaptureFixture
) -> None:
    clock = FakeClock()
    beating = Beating(Session(load_config(cli.config), clock))
    beating.beat()
    held = cli.key_file.read_bytes()
    cli.ok("key", "rotate", stdin=recovery)
    beating.beat()
    assert "rotated" not in caplog.text, "not a request more with each heartbeat"
    clock.advance(3601)
    for _ in range(3):
        beating.beat()
    (told,) = [record for record in caplog.records if "rotated" in record.message]
    assert "it is of generation 2" in told.message
    assert held != cli.key_file.read_bytes()
    fresh = Session(load_config(cli.config), clock)
    caplog.clear()
    Beating(fresh).beat()
    assert "rotated" not in caplog.text
