"""The files of a deployment over real sites, and starting its run."""

import datetime
import ipaddress
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from federa.config import anchored, dump_config, load_config
from federa.errors import InputError, RunError
from federa.folder import RunFolder, write_atomic

CONNECTION = "federa"  # of Flower's config.toml
QUIET = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "RAY_USAGE_STATS_ENABLED": "0"}
_DAYS = 365  # that test certificates hold


def init_project(
    config: str | Path,
    directory: str | Path,
    *,
    sites: int | None = None,
    address: str = "127.0.0.1:8000",
    insecure: bool = False,
    overrides: Sequence[str] = (),
) -> Path:
    """Writes the deployment of a configuration: app/, server/, one folder a site, README.md.

    sites: SuperNodes (None: one a client). address: HOST:PORT of the SuperLink as the sites reach it. Keys and
    certificates are made here, for tests and trials; files are readable by their owner alone. Raises InputError for a
    folder that is not empty and for what `load_config` refuses.
    """
    resolved = anchored(load_config(config, overrides))
    clients = resolved.partition.clients
    sites = clients if sites is None else sites
    if not 1 <= sites <= clients or (resolved.partition.scheme == "sites" and sites != clients):
        raise InputError(f"--sites: must be a number from 1 to {clients} clients, all for scheme sites, got {sites}")
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 2**16:
        raise InputError(f"--address: must be HOST:PORT, got {address!r}")
    folder = Path(os.path.abspath(Path(directory).expanduser()))
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{directory}: must be a new or an empty folder")
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    for name in ("app", "server", *(f"site-{site}" for site in range(sites))):
        (folder / name).mkdir(mode=0o700)
    _write(folder / "app" / "pyproject.toml", _project_file(dump_config(resolved), folder))
    _write(folder / "server" / "env", _env(shlex.quote(str(folder / "server"))))
    for site in range(sites):
        _write(folder / f"site-{site}" / "env", _env('"$PWD"'))
        _write(folder / f"site-{site}" / "node.toml", _node_config(site, sites))
    secure = "insecure = true" if insecure else f"root-certificates = {json.dumps(str(folder / 'server' / 'ca.crt'))}"
    connection = f"[superlink]\ndefault = {json.dumps(CONNECTION)}\n\n[superlink.{CONNECTION}]\n"
    _write(folder / "server" / "config.toml", f"{connection}address = {json.dumps(address)}\n{secure}\n")
    if not insecure:
        _write_keys(folder, host, sites)
    _write(folder / "README.md", _readme(folder, sites, address, insecure))
    return folder


def resume_project(run_folder: str | Path, overrides: Sequence[str] = ()) -> None:
    """Takes up a run over sites: sends the deployment's app again, whose server goes on after the last saved round.

    Raises RunError where the SuperLink is not there or the run ends unfinished.
    """
    folder = RunFolder.open(run_folder)
    project = Path(folder.read_json(folder.path / "flower.json", ("project",))["project"])
    if not (project / "app" / "pyproject.toml").is_file():
        raise InputError(f"{project}: must be the deployment that this run began in, got no app/pyproject.toml")
    submit(project, output=os.path.abspath(folder.path), set=chr(10).join(overrides))
    if folder.result() is None:
        raise RunError(f"{run_folder}: the run over sites has stopped before its end; Flower's log above says why")


def submit(project: Path, **settings: str) -> None:
    """`flwr run` of a deployment with some of its app's settings changed, until it ends. RunError if Flower refuses."""
    command = ["run", str(project / "app"), CONNECTION, "--stream"]
    command += ["--run-config", " ".join(f"{key}={json.dumps(value)}" for key, value in settings.items())]
    if subprocess.run([*flwr(), *command], env=environment_of(project)).returncode != 0:
        raise RunError(f"`flwr {shlex.join(command)}` failed; is the SuperLink running? See {project / 'README.md'}")


def flwr() -> list[str]:
    """The command of Flower's own command line in this environment."""
    return [sys.executable, "-c", "from flwr.cli.app import app; app(prog_name='flwr')"]


def environment_of(project: Path) -> dict[str, str]:
    return os.environ | QUIET | {"FLWR_HOME": str(project / "server")}


def is_over_sites(run_folder: Path) -> bool:
    return (Path(run_folder) / "flower.json").is_file()


def _write(path: Path, content: str | bytes) -> None:
    write_atomic(path, content)
    path.chmod(0o600)


def _project_file(config: str, folder: Path) -> str:
    """The whole app: it names federa's own components, so that no code is sent and each site runs what it installed."""
    return f"""\
[project]
name = "federa-run"
version = "1.0.0"
description = "A run of federa over real sites"
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "federa"

[tool.flwr.app.components]
serverapp = "federa.flower.server_app:app"
clientapp = "federa.flower.client_app:app"

[tool.flwr.app.config]
output = {json.dumps(str(folder / "run"))}
project = {json.dumps(str(folder))}
set = ""
config = {_toml(config)}
"""


def _toml(text: str) -> str:
    """A string as TOML has it: literally, so that people can read and edit it, where that can be."""
    return json.dumps(text, ensure_ascii=False) if "'''" in text else f"'''\n{text}'''"


def _write_keys(folder: Path, host: str, sites: int) -> None:
    """server/: ca.crt, ca.key, server.pem, server.key. site-I/: ca.crt, key, key.pub (EC P-384, OpenSSH's format)."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

    def name(text: str) -> x509.Name:
        return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])

    def pem(key) -> bytes:
        kind = serialization.PrivateFormat.PKCS8
        return key.private_bytes(serialization.Encoding.PEM, kind, serialization.NoEncryption())

    now = datetime.datetime.now(datetime.UTC)
    authority, server = (ec.generate_private_key(ec.SECP384R1()) for _ in range(2))

    def certificate(subject: str, key) -> x509.CertificateBuilder:
        builder = x509.CertificateBuilder().subject_name(name(subject)).issuer_name(name("federa test CA"))
        builder = builder.public_key(key.public_key()).serial_number(x509.random_serial_number())
        identity = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
        issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.public_key())
        builder = builder.add_extension(identity, False).add_extension(issuer, False)
        return builder.not_valid_before(now - datetime.timedelta(hours=1)).not_valid_after(
            now + datetime.timedelta(days=_DAYS)
        )

    usage = dict.fromkeys(
        ("digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement",
         "encipher_only", "decipher_only"), False
    )  # fmt: skip
    root = certificate("federa test CA", authority).add_extension(x509.BasicConstraints(True, 0), True)
    root = root.add_extension(x509.KeyUsage(**usage, key_cert_sign=True, crl_sign=True), True)
    names: list[x509.GeneralName] = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    try:
        names.append(x509.IPAddress(ipaddress.ip_address(host)))
    except ValueError:
        names.append(x509.DNSName(host))
    leaf = certificate(host, server).add_extension(x509.SubjectAlternativeName(list(dict.fromkeys(names))), False)
    leaf = leaf.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), False)
    ca = root.sign(authority, hashes.SHA384()).public_bytes(serialization.Encoding.PEM)
    _write(folder / "server" / "ca.crt", ca)
    _write(folder / "server" / "ca.key", pem(authority))
    _write(
        folder / "server" / "server.pem", leaf.sign(authority, hashes.SHA384()).public_bytes(serialization.Encoding.PEM)
    )
    _write(folder / "server" / "server.key", pem(server))
    for site in range(sites):
        key = ec.generate_private_key(ec.SECP384R1())
        kind = serialization.PrivateFormat.OpenSSH
        private = key.private_bytes(serialization.Encoding.PEM, kind, serialization.NoEncryption())
        public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
        _write(folder / f"site-{site}" / "ca.crt", ca)
        _write(folder / f"site-{site}" / "key", private)
        _write(folder / f"site-{site}" / "key.pub", public + b"\n")


def superlink_command(address: str, insecure: bool) -> list[str]:
    """Starts the SuperLink, in server/; it listens on every interface unless the address is this machine's own."""
    host, _, port = address.rpartition(":")
    command = ["flower-superlink", "--host", host if host in ("127.0.0.1", "localhost") else "0.0.0.0", "--port", port]
    command += ["--database", "state.db", "--disable-runtime-dependency-installation"]
    if insecure:
        return [*command, "--insecure"]
    keys = ["--ssl-ca-certfile", "ca.crt", "--ssl-certfile", "server.pem", "--ssl-keyfile", "server.key"]
    return [*command, *keys, "--enable-supernode-auth"]


def supernode_command(site: int, address: str, insecure: bool) -> list[str]:
    """Starts a site's SuperNode, in the site's folder."""
    command = ["flower-supernode", "--superlink", address, "--port", str(9094 + site), "--node-config", "node.toml"]
    keys = ["--root-certificates", "ca.crt", "--auth-supernode-private-key", "key"]
    return command + (["--insecure"] if insecure else keys)


def _env(home: str) -> str:
    values = QUIET | {"FLWR_HOME": home}
    return "".join(f"export {name}={value}\n" for name, value in values.items())


def _node_config(site: int, sites: int) -> str:
    return f"""\
# What this site says of itself; clients c with c modulo num-partitions = partition-id are its own.
partition-id = {site}
num-partitions = {sites}
worker = "worker.sock"  # of `federa worker`, in this folder; without it every message loads the base model anew

# Where things are here, if not where the run's configuration says:
# data.path = "/srv/texts"    # a file, or a folder with train.*; data.name for the hub; data.text, data.label: columns
# model.name = "/srv/models/roberta-base"
# model.device = "cuda"
"""


def _readme(folder: Path, sites: int, address: str, insecure: bool) -> str:
    if insecure:
        keys = "**Insecure**: nothing is encrypted and nobody is authenticated. For trials on one machine only."
        register = ""
    else:
        keys = f"""\
Certificates and keys were made here, for a trial, and hold {_DAYS} days. For more, take certificates of your own
authority, and let each site make its key itself (`ssh-keygen -t ecdsa -b 384 -f key`) and send `key.pub` alone."""
        commands = (f"flwr supernode register ../site-{site}/key.pub {CONNECTION}\n" for site in range(sites))
        register = f"""
Once it is up, register the sites' keys, in another shell; the SuperLink refuses all others:

```
cd {folder / "server"} && . ./env
{"".join(commands)}```
"""
    return f"""\
# A run of federa over {sites} sites

{keys}

Everywhere: the same version of `federa[flower]`. Each `env` turns Flower's telemetry and update check off.

## The server ({address})

```
cd {folder / "server"} && . ./env
{shlex.join(superlink_command(address, insecure))}
```
{register}
## Each site

Copy its folder (`site-0`, ...) to its machine, readable by its owner alone, and say in `node.toml` where its data are.
Two processes in that folder; the worker keeps the model in memory, the SuperNode only calls out:

```
cd site-0 && . ./env
federa worker worker.sock
{shlex.join(supernode_command(0, address, insecure))}
```

Several on one machine: each its own folder and its own `--port`.

## The run

```
cd {folder / "server"} && . ./env
flwr run ../app {CONNECTION} --stream
flwr ls {CONNECTION}           # the runs; flwr stop RUN_ID {CONNECTION} stops one
federa resume ../run      # takes it up again, after whatever stopped it
```

What it leaves is in `run/`, on the server: metrics.jsonl, checkpoints/, adapter/ and report.html as of any run of
federa, and sites.jsonl: each round's traffic, seconds and failures, by site.
"""
