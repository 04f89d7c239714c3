"""The tests' own Grid behaves as Flower's."""

import time

import pytest
from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode

from tests.local_grid import LocalGrid


def counting_app():
    app = ClientApp()

    @app.train()
    def train(message, context):
        seen = context.state.config_records.get("seen", ConfigRecord({"times": 0}))
        seen["times"] += 1
        context.state["seen"] = seen
        if message.content.config_records.get("config", {}).get("fail"):
            raise RuntimeError("out of memory")
        times, partition = seen["times"], context.node_config["partition-id"]
        metrics = MetricRecord({"times": times, "partition": partition})
        return Message(RecordDict({"m": metrics}), reply_to=message)

    return app


def ask(grid, partition, **config):
    content = RecordDict({"config": ConfigRecord(config)})
    return Message(content, grid.node_id(partition), "train")


def test_state_lasts_per_node_and_nodes_know_their_partition():
    grid = LocalGrid(counting_app(), 2)
    for times in (1, 2):
        replies = grid.send_and_receive([ask(grid, 0), ask(grid, 1)])
        told = sorted((r.content["m"]["partition"], r.content["m"]["times"]) for r in replies)
        assert told == [(0, times), (1, times)]


def test_an_exception_is_an_error_reply_and_leaves_no_state():
    grid = LocalGrid(counting_app(), 1)
    (failed,) = grid.send_and_receive([ask(grid, 0, fail=True)])
    assert failed.error.code == ErrorCode.CLIENT_APP_RAISED_EXCEPTION
    assert "out of memory" in failed.error.reason
    (reply,) = grid.send_and_receive([ask(grid, 0)])
    assert reply.content["m"]["times"] == 1


def test_what_is_pushed_is_what_travels():
    grid = LocalGrid(counting_app(), 1, finish_order=[0])
    message = ask(grid, 0)
    (message_id,) = grid.push_messages([message])
    message.content["config"]["fail"] = True
    (reply,) = grid.pull_messages([message_id])
    assert reply.has_content()


def test_a_reply_can_be_pulled_once():
    grid = LocalGrid(counting_app(), 1)
    (message_id,) = grid.push_messages([ask(grid, 0)])
    (reply,) = grid.pull_messages([message_id])
    assert reply.metadata.reply_to_message_id == message_id and reply.metadata.message_id
    (again,) = grid.pull_messages([message_id])
    assert again.error.code == ErrorCode.MESSAGE_UNAVAILABLE


@pytest.mark.parametrize(("picks", "expected"), [([0], [0, 1, 2]), ([2, 1], [2, 1, 0])])
def test_finish_order(picks, expected):
    grid = LocalGrid(counting_app(), 3, finish_order=picks)
    ids = grid.push_messages([ask(grid, partition) for partition in range(3)])
    seen = []
    for _ in range(3):
        (reply,) = grid.pull_messages(ids)
        ids.remove(reply.metadata.reply_to_message_id)
        seen.append(reply.content["m"]["partition"])
    assert seen == expected


def test_threads_finish_as_their_delays_say():
    def wait_for_the_next(partition):
        while len(grid.executed) < 2 - partition:
            time.sleep(0.001)
        return 0.0

    grid = LocalGrid(counting_app(), 3, delay_s=wait_for_the_next)
    replies = grid.send_and_receive([ask(grid, partition) for partition in range(3)])
    assert sorted(reply.content["m"]["partition"] for reply in replies) == [0, 1, 2]
    finished = [message.metadata.dst_node_id for message in grid.executed]
    assert finished == [grid.node_id(partition) for partition in (2, 1, 0)]


def test_silent_and_refusing_nodes():
    grid = LocalGrid(counting_app(), 3, silent={0}, refused={1})
    messages = [ask(grid, partition) for partition in range(3)]
    assert len(grid.push_messages(messages)) == 2
    replies = grid.send_and_receive([ask(grid, 0), ask(grid, 2)], timeout=0.02)
    assert [reply.content["m"]["partition"] for reply in replies] == [2]


def test_node_ids_are_random_unless_seeded():
    ids = [tuple(LocalGrid(counting_app(), 3).get_node_ids()) for _ in range(2)]
    assert ids[0] != ids[1]
    seeded = [tuple(LocalGrid(counting_app(), 3, seed=1).get_node_ids()) for _ in range(2)]
    assert seeded[0] == seeded[1]
