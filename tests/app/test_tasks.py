"""The task by its name in the settings, and what is refused before anything starts."""

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from PIL import Image

from flwr_moe.app.registry import SYSTEMS
from flwr_moe.app.settings import ConfigError, Settings
from flwr_moe.app.tasks import build_task, check_task
from flwr_moe.app.train_config import train_config
from flwr_moe.cli import main
from flwr_moe.client_apps import build_client_app
from flwr_moe.client_apps.training import train_by_order
from flwr_moe.messages.training import TrainOrder
from flwr_moe.tasks import Digits
from flwr_moe.tasks.cifar10 import Cifar10, crop_and_flip
from flwr_moe.tasks.vgg import VGG
from tests.local_grid import LocalGrid


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder of 800 training and 40 test images, all of one noise."""
    folder = tmp_path_factory.mktemp("data")
    stream = io.BytesIO()
    noise = np.random.default_rng(0).integers(256, size=(32, 32, 3), dtype=np.uint8)
    Image.fromarray(noise).save(stream, "PNG")
    for split, n in (("train", 800), ("test", 40)):
        rows = {"img": [stream.getvalue()] * n, "label": [i % 10 for i in range(n)]}
        pq.write_table(pa.table(rows), folder / f"{split}.parquet")
    return str(folder)


@pytest.fixture(autouse=True)
def temporary(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))


def images(data, **more):
    return Settings(task="cifar10", data=data, num_clusters=2, **more)


def test_the_default_is_digits_by_camera():
    task = build_task(Settings(), 12, 3)
    assert isinstance(task, Digits) and task.partition == "domains" and task.seed == 3
    assert (task.num_clients, task.num_clusters, task.num_experts, task.top_k) == (12, 6, 12, 2)


def test_settings_reach_the_images(data):
    task = build_task(images(data), 4, 0)
    assert isinstance(task, Cifar10) and (task.partition, task.width) == ("iid", 1.0)
    assert (task.model, task.augment, task.num_train, task.num_test) == ("vgg-small", None, 0, 0)
    settings = images(
        data,
        partition="dirichlet",
        dirichlet_alpha=0.7,
        model="vgg11",
        model_width=0.125,
        num_train=200,
        num_test=30,
        augment=True,
    )
    task = build_task(settings, 5, 2)
    assert (task.partition, task.dirichlet_alpha, task.seed) == ("dirichlet", 0.7, 2)
    assert sum(len(task.train_data(p)) for p in range(5)) == 200
    assert sum(map(len, task.test_data())) == 30 and len(task.test_data()) == 2
    with torch.device("meta"):
        known = VGG("vgg11", 10, 0.125).state_dict()
        made = task.build_model().state_dict()
    assert {k: v.shape for k, v in made.items()} == {k: v.shape for k, v in known.items()}
    assert task.augment is crop_and_flip


def test_a_slash_or_a_folder_is_a_data_set_of_ones_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    for name in ("somebody/images", "mine"):
        assert build_task(Settings(task=name), 6, 0).hub == name
    for name in ("cifar", "", "nowhere"):
        with pytest.raises(ConfigError, match=f"task '{name}' is not available .* digits, cifar10"):
            Settings(task=name)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"task": "digits", "model": "vgg11"}, "model='vgg11': expected none, task='digits'"),
        ({"task": "digits", "num_train": 9}, "num-train=9: expected none, task='digits'"),
        ({"partition": "conflict"}, "partition='conflict': task='cifar10' has iid and dirichlet"),
        ({"num_train": 301}, "num-train is 301, expected at most 300 with this data"),
        ({"num_test": 41}, "num-test is 41, expected at most 40 with this data"),
        ({"model": "resnet"}, "model is 'resnet', expected one of vgg-small"),
        ({"data": ""}, "data is empty, expected --data DIR"),
    ],
)
def test_what_does_not_fit_shows_before_the_start(data, settings, message):
    with pytest.raises(ValueError, match=message):
        check_task(images(data).replace(**settings), ["fedavg"], 6)


def test_systems_of_experts_refuse_a_model_without(data):
    check_task(images(data), ["fedavg", "fedasync"], 6)
    with pytest.raises(ConfigError, match="system 'ems-fl' needs a model with experts"):
        check_task(images(data), ["fedavg", "ems-fl"], 6)


def test_the_command_refuses_missing_data_in_one_line(tmp_path, capsys):
    out = tmp_path / "out"
    code = main(
        ["compare", "fedavg", "--task", "cifar10", "--data", str(tmp_path), "--out", str(out)]
    )
    error = capsys.readouterr().err
    assert code == 2 and error.count("\n") == 1 and "neither cifar10/train.parquet" in error
    assert not out.exists()


def test_images_are_not_trained_as_warm_started_digits(data):
    rate = train_config(images(data).replace(system="fedavg"), 0)["learning-rate"]
    assert rate == train_config(Settings(partition="iid", system="fedavg"), 0)["learning-rate"]
    assert rate != SYSTEMS["fedavg"].tuned["warm"].learning_rate


@pytest.mark.parametrize("augment", [False, True])
def test_a_client_trains_on_what_the_task_makes_of_its_images(data, augment):
    task = build_task(images(data, model_width=0.25, augment=augment), 8, 0)
    start = task.warm_model()
    order = {"local-steps": 2, "learning-rate": 0.01, "batch-size": 8, "seed": 5, "server-round": 1}
    content = {
        "arrays": ArrayRecord(start.state_dict()),
        "config": ConfigRecord(order),
    }
    grid = LocalGrid(build_client_app(lambda context: task, lambda context: 1.0), 1)
    message = Message(RecordDict(content), grid.node_id(0), "train")
    (reply,) = grid.send_and_receive([message])
    trained = reply.content.array_records["arrays"].to_torch_state_dict()
    # What the reply should be, with and without the transform.
    expected = {}
    for how in (None, crop_and_flip):
        model = task.warm_model()
        train_by_order(
            model, task.train_data(0), TrainOrder.of(content["config"], 0), transform=how
        )
        expected[how is not None] = model.state_dict()
    assert all(torch.equal(trained[key], expected[augment][key]) for key in trained)
    assert not torch.equal(trained["classifier.weight"], expected[not augment]["classifier.weight"])
