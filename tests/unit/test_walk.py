"""Walking images from layer to layer: inputs are those of a whole pass, and nothing runs twice."""

import copy
from collections import Counter

import pytest
import tiny
import torch
from qwt_mmdet.detectors.forward import forward_scope
from qwt_mmdet.replay.cache import ActivationCache
from qwt_mmdet.replay.forwards import (
    Placeholders,
    has_untied,
    made_of,
    new_leaf,
    outlined,
    replaced_forwards,
    tied,
)
from qwt_mmdet.replay.walk import ReachedError, Walk
from torch import nn

pytestmark = pytest.mark.usefixtures("device")


def layers_of(model):
    return [name for name, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]


def inputs_of_layers(model, image):
    """What each layer is called with in a plain pass, in the order of calls."""
    found = []
    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, inputs, name=name: found.append((name, inputs[0].clone()))
        )
        for name in layers_of(model)
    ]
    with torch.no_grad():
        forward_scope(model, image, "backbone")
    for handle in handles:
        handle.remove()
    return found


def walk_over(model, images, order, cache):
    """A walk over layers of the backbone, for these images."""
    for number, image in enumerate(images):
        cache["image", number] = image
    return Walk(model, order, cache, "backbone", ignored=nn.Dropout)


def reach(walk, model, name, number, calls=1):
    """Inputs of the first ``calls`` calls of a layer, on a way that stops there."""
    seen = []

    def stop(module, inputs):
        seen.append(inputs[0].clone())
        if len(seen) == calls:
            raise ReachedError

    handle = model.get_submodule(name).register_forward_pre_hook(stop)
    with torch.no_grad():
        walk.run(number, name)
    handle.remove()
    return seen


def counting(model, runs):
    """Forwards of the modules that hold no others, which count how often they run."""

    def count(name, forward):
        def counted(*args):
            runs[name] += 1
            return forward(*args)

        return counted

    return {
        module: count(name, module.forward)
        for name, module in model.named_modules()
        if not list(module.children())
    }


def walk_all(model, images, record=True, memory_gb=4.0):
    """Inputs of every layer by name and image, and how often every module ran."""
    runs, seen = Counter(), {}
    order = list(dict.fromkeys(name for name, _ in inputs_of_layers(model, images[0])))
    with ActivationCache(memory_gb=memory_gb) as cache, replaced_forwards(counting(model, runs)):
        walk = walk_over(model, images, order, cache)
        with walk.active():
            if record:
                with torch.no_grad():
                    walk.record("backbone")
            for name in order:
                for number in range(len(images)):
                    seen[name, number] = reach(walk, model, name, number)
                walk.pending.discard(name)
    return seen, runs


@pytest.mark.parametrize("record", [True, False])
@pytest.mark.parametrize("kind", tiny.KINDS)
def test_each_layer_is_reached_with_the_input_of_a_whole_pass(kind, record):
    model, images = tiny.detector(kind), tiny.batches(2)
    seen, runs = walk_all(model, images, record)
    for number, image in enumerate(images):
        for name, x in inputs_of_layers(model, image):
            assert torch.equal(seen[name, number][0], x), name
    calls = Counter()
    with replaced_forwards(counting(model, calls)):
        inputs_of_layers(model, images[0])
    recorded = calls if record else {}
    for name in runs.keys() & set(layers_of(model)):
        assert runs[name] <= len(images) * calls[name] + recorded.get(name, 0), name


def test_what_waits_on_disk_comes_back_the_same():
    model, images = tiny.detector("resnet"), tiny.batches(2)
    seen, _ = walk_all(model, images, memory_gb=0.0)
    for name, x in inputs_of_layers(model, images[1]):
        assert torch.equal(seen[name, 1][0], x)


class Shared(nn.Module):
    """Two layers that run once for each of two levels, one of them in an order that the image decides."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.last = (nn.Conv2d(3, 3, 1) for _ in range(3))

    def forward(self, x):
        y = [self.second(self.first(level).relu_()) for level in (x, x[..., ::2, ::2])]
        if x.mean() > 0:
            return self.last(y[0]).mean() + y[1].mean()
        return self.second(self.last(x)).mean() + y[0].mean()


def test_layers_that_run_several_times_in_an_order_that_varies():
    model = tiny.TinyDetector(Shared()).to(tiny.device)
    images = [{"inputs": [torch.randn(3, 8, 8, device=tiny.device) + shift]} for shift in (5, -5)]
    with ActivationCache() as cache:
        order = [f"backbone.{name}" for name in ("first", "second", "last")]
        walk = walk_over(model, images, order, cache)
        with walk.active(), torch.no_grad():
            walk.record("backbone")
            for name in order:
                for number, image in enumerate(images):
                    plain = copy.deepcopy(model)
                    for module in plain.modules():
                        vars(module).pop("forward", None)
                    expected = [x for n, x in inputs_of_layers(plain, image) if n == name]
                    seen = reach(walk, model, name, number, calls=len(expected))
                    assert len(seen) == len(expected)
                    assert all(map(torch.equal, seen, expected))
                walk.pending.discard(name)


class Erased(nn.Module):
    """Maps whose memory is used for other values, and a module with a tensor that stays on the CPU."""

    class Sizes(nn.Module):
        def forward(self, x):
            return x + 1, torch.tensor([float(side) for side in x.shape]), x.shape[-1]

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.third, self.last = (nn.Conv2d(3, 3, 1) for _ in range(4))
        self.sizes = self.Sizes()

    def forward(self, x):
        a, b = self.first(x), self.second(x)
        a, b = a.zero_().add_(x), b.zero_().sub_(x)
        y, sizes, width = self.sizes(self.third(a + b))
        return self.last(y * sizes[-1] / width)


def test_memory_and_devices_of_outputs_that_nobody_reads_any_more():
    model, images = tiny.TinyDetector(Erased()).to(tiny.device), tiny.batches(2, size=(8, 8))
    seen, _ = walk_all(model, images)
    for number, image in enumerate(images):
        for name, x in inputs_of_layers(model, image):
            assert torch.equal(seen[name, number][0], x), name


def test_tensors_of_any_type_and_device_are_followed(device):
    values = [torch.ones(2, device=device), torch.ones(2), torch.ones(2, dtype=torch.float16)]
    leaves = [new_leaf(), new_leaf()]
    ties = tied([*values, torch.arange(2)], leaves[0])
    assert made_of(ties, leaves) == made_of(ties[1:], leaves) == [True, False]
    assert made_of([tied(values[2], leaves[1]), *ties], leaves) == [True, True]
    assert [(t.dtype, t.device) for t in ties[:3]] == [(v.dtype, v.device) for v in values]
    assert has_untied(ties)
    assert not has_untied(values)


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [(torch.float32, True), (torch.float16, True), (torch.int64, False), (torch.bool, False)],
)
def test_what_is_not_known_is_nan_also_after_code_has_worked_in_place(dtype, expected, device):
    placeholders, outlines = (
        Placeholders(),
        outlined([torch.ones(2, 3, dtype=dtype, device=device)]),
    )
    (first,) = placeholders.of(outlines)
    assert (first.dtype, first.device, first.isnan().all()) == (dtype, device, expected)
    assert placeholders.of(outlines)[0].data_ptr() == first.data_ptr()
    first.fill_(1)
    (second,) = placeholders.of(outlines)
    assert second.shape == (2, 3)
    assert second.isnan().all() if expected else not second.any()
