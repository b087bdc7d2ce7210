"""A grid in this process: Flower's messages between its ServerApp and its ClientApp without a network."""

import json
from pathlib import Path

import pytest

from federa.config import Config, changed

flwr = pytest.importorskip("flwr", reason="flwr is not installed: pip install 'federa[flower]'")

from flwr.app import Context, Error, Message, RecordDict  # noqa: E402
from flwr.serverapp import Grid  # noqa: E402


class InProcessGrid(Grid):
    """Nodes 1..N of one ClientApp. `change(node, message, reply) -> reply or None (none comes)` stands for failures.

    Messages and replies go through Flower's own serialisation, as on a network.
    """

    def __init__(self, app, nodes: int, change=lambda node, message, reply: reply, **settings):
        self.app = app
        self.change = change
        self.nodes = {
            node: {"partition-id": node - 1, "num-partitions": nodes} | settings for node in range(1, nodes + 1)
        }
        self.replies: dict[str, Message] = {}
        self.sent: list[Message] = []

    def set_run(self, run):
        pass

    @property
    def run(self):
        raise NotImplementedError

    def create_message(self, *arguments, **options):
        raise NotImplementedError

    def send_and_receive(self, messages, *, timeout=None):
        raise NotImplementedError

    def get_node_ids(self):
        return list(self.nodes)

    def push_messages(self, messages):
        idents = []
        for message in messages:
            ident = f"message-{len(self.sent)}"
            message.metadata.__dict__["_message_id"] = ident
            self.sent.append(message)
            idents.append(ident)
            node = message.metadata.dst_node_id
            context = Context(1, node, self.nodes[node], RecordDict(), {})
            try:
                reply = self.app(_copied(message), context)
            except Exception as error:
                reply = Message(Error(2, f"{type(error)}:<'{error}'>"), reply_to=message)
            reply = self.change(node, message, reply)
            if reply is not None:
                self.replies[ident] = reply
        return idents

    def pull_messages(self, message_ids):
        return [self.replies.pop(ident) for ident in message_ids if ident in self.replies]


def _copied(message: Message) -> Message:
    """What the other side of a network would see: every object deflated and inflated."""
    from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
    from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents

    ident = message.metadata.message_id
    objects = {name: item.deflate() for name, item in get_all_nested_objects(message).items()}
    copy = inflate_object_from_contents(message.object_id, objects)
    copy.metadata.__dict__["_message_id"] = ident
    return copy


@pytest.fixture(autouse=True)
def _identity(monkeypatch, tmp_path):
    """Since flwr 1.39 a message asks for the identity of the process that makes it, which Flower's launcher sets."""
    from flwr.supercore.task_identity import TaskIdentity

    for name in ("_run_id", "_node_id", "_task_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def pilot(tiny_config) -> Config:
    """Three clients, all of them in each of two rounds; every site has all texts and takes its share."""
    return changed(
        tiny_config,
        partition={"clients": 3},
        data={"path": None, "max_train": 90, "max_test": 30},
        server={"rounds": 2, "clients_per_round": None},
    )


@pytest.fixture(scope="session")
def site_data(tiny_data, tmp_path_factory) -> Path:
    """The tiny data by author modulo 3: all/ with a column "site", and site-0/, site-1/, site-2/ with theirs alone."""
    folder = tmp_path_factory.mktemp("site_data")
    rows = [json.loads(line) for line in (tiny_data / "train.jsonl").open()]
    rows = [row | {"site": f"s{int(row['author'].split()[1]) % 3}"} for row in rows]
    test = [json.loads(line) | {"site": "s0"} for line in (tiny_data / "test.jsonl").open()]

    def write(file: Path, chosen) -> None:
        file.parent.mkdir(exist_ok=True)
        file.write_text("".join(json.dumps(row) + "\n" for row in chosen))

    write(folder / "all" / "train.jsonl", rows)
    for site in range(3):
        write(folder / f"site-{site}" / "train.jsonl", [row for row in rows if row["site"] == f"s{site}"])
    for name in ("all", "server"):
        write(folder / name / "test.jsonl", test)
    write(folder / "server" / "train.jsonl", test)
    return folder
