"""The digits task: who holds which images, seen how."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from flwr_moe.tasks import Digits
from flwr_moe.tasks import digits as digits_module
from flwr_moe.tasks.digits import MOUNTINGS
from flwr_moe.training import Samples, accuracy_and_loss, predict, train_steps

NUM_IMAGES, NUM_TRAIN, NUM_PUBLIC, NUM_TEST = 1797, 1257, 180, 360
# What undoes each mounting.
UNDO = {
    "upright": lambda image: image,
    "rotated-90": lambda image: np.rot90(image, -1, (1, 2)),
    "rotated-180": lambda image: np.rot90(image, 2, (1, 2)),
    "mirrored": lambda image: np.flip(image, 2),
    "inverted": lambda image: 1 - image,
    "rotated-90-inverted": lambda image: 1 - np.rot90(image, -1, (1, 2)),
}
CHANCE = 0.1


def make(num_clients=8, num_clusters=6, seed=0):
    return Digits(num_clients, num_clusters, num_experts=12, top_k=2, seed=seed)


@pytest.fixture(scope="module")
def image_index():
    """Index of an image by its bytes; all images are different."""
    images = (load_digits().images / 16).astype(np.float32)
    index = {image.tobytes(): i for i, image in enumerate(images)}
    assert len(index) == NUM_IMAGES
    return index


def indices(samples, cluster, image_index):
    upright = list(UNDO.values())[cluster](samples.x.numpy())
    # Grey values are sixteenths, so that inverting twice is exact.
    return [image_index[np.ascontiguousarray(image).tobytes()] for image in upright]


def test_a_clusters_devices_share_all_training_digits(image_index):
    task = make(num_clients=14)
    labels = load_digits().target
    everything = []
    for cluster in range(6):
        devices = [p for p in range(14) if task.cluster_of(p) == cluster]
        assert len(devices) == (3 if cluster < 2 else 2)
        data = [task.train_data(p) for p in devices]
        held = [indices(samples, cluster, image_index) for samples in data]
        for samples, mine in zip(data, held, strict=True):
            assert (samples.y.numpy() == labels[mine]).all()
        together = [i for mine in held for i in mine]
        # Disjoint and complete; shares differ by one image at most.
        assert len(together) == len(set(together)) == NUM_TRAIN
        assert max(map(len, held)) - min(map(len, held)) <= 1
        everything.append(frozenset(together))
    assert len(set(everything)) == 1

    held_out = [indices(s, k, image_index) for k, s in enumerate(task.test_data())]
    assert all(mine == held_out[0] for mine in held_out)
    public = indices_of_public(task, image_index)
    parts = [everything[0], set(held_out[0]), set(public[0])]
    assert [len(part) for part in parts] == [NUM_TRAIN, NUM_TEST, NUM_PUBLIC]
    assert set.union(*map(set, parts)) == set(range(NUM_IMAGES))


def indices_of_public(task, image_index):
    views = task.public_data()
    return [
        indices(type(views)(x, y), k, image_index)
        for k, (x, y) in enumerate(
            zip(views.x.split(NUM_PUBLIC), views.y.split(NUM_PUBLIC), strict=True)
        )
    ]


def test_the_public_share_is_seen_under_every_mounting(image_index):
    task = make()
    views = task.public_data()
    assert len(views) == 6 * NUM_PUBLIC
    public = indices_of_public(task, image_index)
    assert len(public) == 6 and all(mine == public[0] for mine in public)
    labels = load_digits().target[public[0]]
    assert (views.y.numpy() == np.tile(labels, 6)).all()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("upright", [[0.1, 0.2], [0.3, 0.4]]),
        ("rotated-90", [[0.2, 0.4], [0.1, 0.3]]),
        ("rotated-180", [[0.4, 0.3], [0.2, 0.1]]),
        ("rotated-270", [[0.3, 0.1], [0.4, 0.2]]),
        ("mirrored", [[0.2, 0.1], [0.4, 0.3]]),
        ("flipped", [[0.3, 0.4], [0.1, 0.2]]),
        ("inverted", [[0.9, 0.8], [0.7, 0.6]]),
        ("rotated-90-inverted", [[0.8, 0.6], [0.9, 0.7]]),
        ("rotated-180-inverted", [[0.6, 0.7], [0.8, 0.9]]),
        ("rotated-270-inverted", [[0.7, 0.9], [0.6, 0.8]]),
        ("mirrored-inverted", [[0.8, 0.9], [0.6, 0.7]]),
        ("flipped-inverted", [[0.7, 0.6], [0.9, 0.8]]),
    ],
)
def test_mountings_by_hand(name, expected):
    image = np.array([[[0.1, 0.2], [0.3, 0.4]]], dtype=np.float32)
    assert MOUNTINGS[name](image) == pytest.approx(np.array([expected]))


def test_all_mountings_have_a_hand_case_and_differ():
    assert len(MOUNTINGS) == 12
    image = np.arange(64, dtype=np.float32).reshape(1, 8, 8) / 64
    views = [MOUNTINGS[name](image) for name in MOUNTINGS]
    for i in range(12):
        for j in range(i):
            assert not np.allclose(views[i], views[j])


def test_shapes_and_types():
    task = make()
    for samples in (task.train_data(7), task.public_data(), *task.test_data()):
        assert samples.x.shape == (len(samples), 8, 8) and samples.x.dtype == torch.float32
        assert samples.y.shape == (len(samples),) and samples.y.dtype == torch.int64
        assert samples.x.min() >= 0 and samples.x.max() <= 1
    assert [len(samples) for samples in task.test_data()] == [NUM_TEST] * 6
    model = task.build_model()
    assert predict(model, task.test_data()[0].x).shape == (NUM_TEST, 10)
    assert model.moe.num_experts == 12 and model.moe.top_k == 2


def test_the_seed_decides():
    def draw(seed):
        task = make(seed=seed)
        return task.train_data(3).x, task.public_data().x, task.test_data()[2].x

    for one, same, other in zip(draw(1), draw(1), draw(2), strict=True):
        assert torch.equal(one, same) and not torch.equal(one, other)


def test_more_devices_move_no_image_between_the_splits(image_index):
    few, many = make(num_clients=6), make(num_clients=12)
    assert torch.equal(few.test_data()[1].x, many.test_data()[1].x)
    assert torch.equal(few.public_data().x, many.public_data().x)
    halves = torch.cat([many.train_data(1).x, many.train_data(7).x])
    assert torch.equal(few.train_data(1).x, halves)


def test_errors():
    with pytest.raises(ValueError, match="num-clusters is 13, expected 1 to 12"):
        make(20, 13)
    with pytest.raises(ValueError, match="num-clusters is 0, expected 1 to 12"):
        make(20, 0)
    with pytest.raises(ValueError, match="num-clients is 5, expected at least num-clusters = 6"):
        make(5, 6)
    for partition in (-1, 8):
        with pytest.raises(ValueError, match=f"partition-id is {partition}, expected 0 to 7"):
            make().train_data(partition)


# --- models --------------------------------------------------------------------------


def test_the_warm_start_has_learnt_something():
    task = make(num_clients=6)
    model = task.warm_model()
    accuracies = [accuracy_and_loss(predict(model, data.x), data.y)[0] for data in task.test_data()]
    assert min(accuracies) > 5 * CHANCE
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_the_warm_start_comes_from_the_seed_alone(monkeypatch):
    monkeypatch.setattr(digits_module, "WARM_STEPS", 5)
    monkeypatch.setattr(digits_module, "WARM_MOE_STEPS", 5)

    def warm(seed):
        return make(seed=seed).warm_model().state_dict()

    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = warm(0)
    assert torch.equal(torch.get_rng_state(), before)  # nobody else's draws change
    torch.manual_seed(2)
    second, other = warm(0), warm(1)
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not torch.equal(first["stem.weight"], other["stem.weight"])
    # The experts are copies with noise: close to each other, but not the same.
    experts = first["moe.experts.w1"]
    assert not torch.equal(experts[0], experts[1])
    spread = (experts - experts.mean(0)).norm() / experts.norm()
    assert spread < 0.2


def test_train_steps_trains_what_it_is_told():
    task = make()
    model = task.build_model()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    data = task.train_data(0)
    generator = torch.Generator().manual_seed(0)
    loss = train_steps(model, data, 3, 0.01, 16, generator, trainable=model.head.parameters())
    after = model.state_dict()
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed == {"head.weight", "head.bias"}
    assert loss == pytest.approx(np.log(10), abs=0.5)
    assert train_steps(model, data, 0, 0.01, 16, generator) == 0.0


def test_train_steps_trains_on_transformed_inputs():
    task = make()
    data, weights = task.train_data(0), []
    for inputs, transform in (
        (data.x, None),
        (data.x, lambda x, generator: 1 - x),
        (1 - data.x, None),
    ):
        torch.manual_seed(0)
        model = task.build_model()
        generator = torch.Generator().manual_seed(1)
        train_steps(model, Samples(inputs, data.y), 3, 0.01, 16, generator, None, transform)
        weights.append(model.stem.weight.detach())
    assert torch.equal(weights[1], weights[2]) and not torch.equal(weights[0], weights[1])


def test_training_lowers_the_loss_and_repeats():
    task = make()
    data = task.train_data(0)

    def trained():
        torch.manual_seed(0)
        model = task.build_model()
        start = accuracy_and_loss(predict(model, data.x), data.y)[1]
        train_steps(model, data, 30, 0.003, 32, torch.Generator().manual_seed(1))
        return start, predict(model, data.x)

    (start, one), (_, two) = trained(), trained()
    assert torch.equal(one, two)
    assert accuracy_and_loss(one, data.y)[1] < 0.9 * start


def test_accuracy_and_loss_by_hand():
    logits = torch.log(torch.tensor([[0.75, 0.25], [0.5, 0.5 + 1e-6], [0.2, 0.8]]))
    accuracy, loss = accuracy_and_loss(logits, torch.tensor([0, 0, 1]))
    assert accuracy == pytest.approx(2 / 3)
    expected = -(np.log(0.75) + np.log(0.5) + np.log(0.8)) / 3
    assert loss == pytest.approx(expected, abs=1e-5)
