"""A grid in this process: Flower's messages between its ServerApp and its ClientApp without a network."""

from flwr.app import Context, Error, Message, RecordDict
from flwr.serverapp import Grid


class InProcessGrid(Grid):
    """Nodes 1..N of one ClientApp. `change(node, message, reply) -> reply or None (none comes)` stands for failures.

    Messages and replies go through Flower's own serialisation, as on a network; later messages are answered first.
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
                reply.metadata.__dict__["_message_id"] = f"reply-to-{ident}"
                self.replies[ident] = _copied(reply)
        return idents

    def pull_messages(self, message_ids):
        return [self.replies.pop(ident) for ident in reversed(message_ids) if ident in self.replies]


def _copied(message: Message) -> Message:
    """What the other side of a network would see: every object deflated and inflated."""
    from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
    from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents

    ident = message.metadata.message_id
    objects = {name: item.deflate() for name, item in get_all_nested_objects(message).items()}
    copy = inflate_object_from_contents(message.object_id, objects)
    copy.metadata.__dict__["_message_id"] = ident
    return copy
