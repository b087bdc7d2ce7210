"""What `federa flower init` writes: Flower takes it, only its owner reads it, and it holds together."""

import io
import stat
import sys
import tomllib
import zipfile

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.x509 import verification

from federa import cli, strict_yaml
from federa.config import anchored, changed, dump_config, load_config
from federa.errors import InputError
from federa.flower.project import init_project, submit, supernode_command


@pytest.fixture(scope="module")
def project(pilot, tmp_path_factory):
    file = tmp_path_factory.mktemp("config") / "run.yaml"
    file.write_text(dump_config(pilot))
    return init_project(file, file.parent / "p", address="fed.example.org:8443", overrides=["server.rounds=7"])


def test_flower_takes_the_app(project, pilot):
    """Flower's own packer and reader: one file is sent, no code, no key; its configuration is the run's."""
    from flwr.cli.build import build_fab_from_disk
    from flwr.cli.config_utils import load_and_validate
    from flwr.common.config import get_fused_config_from_dir

    fab = build_fab_from_disk(project / "app")
    names = {name for name in zipfile.ZipFile(io.BytesIO(fab)).namelist() if not name.startswith(".info")}
    assert names == {"pyproject.toml"}
    load_and_validate(project / "app" / "pyproject.toml")
    run = get_fused_config_from_dir(project / "app", {})
    assert (run["output"], run["project"], run["set"]) == (str(project / "run"), str(project), "")
    expected = anchored(changed(pilot, server={"rounds": 7}))
    assert load_config(strict_yaml.parse(run["config"])) == expected


def test_nobody_else_reads_it(project):
    for path in (project, *project.rglob("*")):
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path


def test_the_certificate_is_the_servers(project):
    authority = x509.load_pem_x509_certificate((project / "server" / "ca.crt").read_bytes())
    leaf = x509.load_pem_x509_certificate((project / "server" / "server.pem").read_bytes())
    store = verification.Store([authority])
    for name in ("fed.example.org", "localhost"):
        verifier = verification.PolicyBuilder().store(store).build_server_verifier(x509.DNSName(name))
        assert verifier.verify(leaf, [])[0] == leaf
    with pytest.raises(verification.VerificationError):
        verification.PolicyBuilder().store(store).build_server_verifier(x509.DNSName("evil.example.org")).verify(
            leaf, []
        )
    for site in range(3):
        home = project / f"site-{site}"
        assert (home / "ca.crt").read_bytes() == (project / "server" / "ca.crt").read_bytes()
        key = serialization.load_ssh_private_key((home / "key").read_bytes(), None)
        public = serialization.load_ssh_public_key((home / "key.pub").read_bytes())
        assert key.public_key() == public and key.curve.name == "secp384r1"
        node = tomllib.loads((home / "node.toml").read_text())
        assert node == {"partition-id": site, "num-partitions": 3, "worker": "worker.sock"}
    keys = {(project / f"site-{site}" / "key.pub").read_bytes() for site in range(3)}
    assert len(keys) == 3


def test_the_readme_names_every_command(project):
    text = (project / "README.md").read_text()
    for words in (
        "flower-superlink",
        "--enable-supernode-auth",
        "supernode register ../site-2/key.pub",
        "federa worker",
        "flower-supernode --superlink fed.example.org:8443",
        "flwr run ../app",
        "federa resume ../run",
    ):
        assert words in text, words
    for env in ("server/env", "site-1/env"):
        text = (project / env).read_text()
        assert "export FLWR_TELEMETRY_ENABLED=0" in text and "export FLWR_DISABLE_UPDATE_CHECK=1" in text


def test_insecure_is_said_and_has_no_keys(pilot, tmp_path):
    folder = init_project(pilot, tmp_path / "p", insecure=True, sites=2)
    assert "**Insecure**" in (folder / "README.md").read_text()
    assert not [*folder.rglob("*.key"), *folder.rglob("*.crt"), *folder.rglob("key*")]
    assert "--insecure" in supernode_command(0, "127.0.0.1:8000", True)
    assert sorted(path.name for path in folder.glob("site-*")) == ["site-0", "site-1"]


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"sites": 4}, "--sites: must be a number from 1 to 3 clients"),
        ({"sites": 0}, "--sites: must be a number from 1 to 3 clients"),
        ({"address": "8000"}, "--address: must be HOST:PORT, got '8000'"),
        ({"address": "host:99999"}, "--address: must be HOST:PORT, got 'host:99999'"),
        ({"overrides": ["server.round=3"]}, "did you mean server.rounds?"),
    ],
    ids=["too many", "none", "no host", "port", "config"],
)
def test_what_cannot_be(pilot, tmp_path, options, problem):
    with pytest.raises(InputError) as caught:
        init_project(pilot, tmp_path / "p", **options)
    assert problem in str(caught.value) and not (tmp_path / "p").exists()


def test_a_taken_folder_and_the_command_line(pilot, tmp_path, monkeypatch, capsys):
    (tmp_path / "c.yaml").write_text(dump_config(pilot))
    arguments = ["federa", "flower", "init", str(tmp_path / "c.yaml"), str(tmp_path / "p"), "--insecure"]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as done:
        cli.main()
    assert done.value.code == 0 and (tmp_path / "p" / "app" / "pyproject.toml").is_file()
    with pytest.raises(SystemExit) as done:
        cli.main()
    assert done.value.code == 2 and "must be a new or an empty folder" in capsys.readouterr().err


def test_submit_says_what_to_start(project, monkeypatch):
    from federa.errors import RunError
    from federa.flower import project as module

    monkeypatch.setattr(module, "flwr", lambda: [sys.executable, "-c", "raise SystemExit(3)"])
    with pytest.raises(RunError, match="is the SuperLink running\\? See .*README.md"):
        submit(project)


def test_scheme_sites_needs_every_site(pilot, tmp_path):
    with pytest.raises(InputError, match="all for scheme sites, got 2"):
        init_project(changed(pilot, partition={"scheme": "sites"}), tmp_path / "p", sites=2)
