"""When torch.compile is used, what it must give, and CUDA graphs on a stand-in."""

import contextlib

import pytest
import torch

from edm2kit.models import compilation
from edm2kit.models.compilation import GraphedCall, compile_, compile_if_it_pays_, graph_, is_compiled
from edm2kit.models.edm2 import Precond, freeze_
from tests.support.fake_gpu import DEVICE, FakeGPU

CPU = torch.device("cpu")
SMALL = {
    "img_resolution": 8,
    "img_channels": 3,
    "label_dim": 4,
    "model_channels": 8,
    "channel_mult": [1],
    "num_blocks": 1,
    "attn_resolutions": [8],
    "channels_per_head": 8,
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Records of compile times go to a folder of this test."""
    monkeypatch.setenv("DNNLIB_CACHE_DIR", str(tmp_path / "cache"))


def network(**changes) -> Precond:
    torch.manual_seed(0)
    net = Precond(**{**SMALL, **changes})
    for name, parameter in net.named_parameters():
        if name.endswith("gain"):
            parameter.data.fill_(1)  # gains start at 0: such a network answers nothing
    return net


def example(net: Precond, count: int = 2) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, net.img_channels, net.img_resolution, net.img_resolution, generator=generator)
    return x, torch.linspace(0.5, 2, count), torch.eye(4)[:count]


# ---- whether it pays


def decide(monkeypatch, plain_sec, fast_sec, count=100_000, backend="eager"):
    """(whether networks are compiled, the networks), with measured times that are given."""
    net = freeze_(network())
    times = iter([plain_sec, fast_sec])
    monkeypatch.setattr(compilation, "BACKEND", backend)
    monkeypatch.setattr(compilation, "seconds_of", lambda run, device: next(times))
    x, sigma, labels = example(net)
    run = torch.no_grad()(lambda: net(x, sigma, labels))
    before = run()
    answer = compile_if_it_pays_([net], run, count, CPU, "evaluation")
    torch.testing.assert_close(run(), before, atol=1e-5, rtol=1e-5)
    return answer, net


def test_a_long_run_is_compiled_and_what_it_took_is_recorded(monkeypatch, capsys):
    answer, net = decide(monkeypatch, plain_sec=0.1, fast_sec=0.05)
    assert answer
    assert is_compiled(net)
    assert "100000 evaluations are left, 0.1 s each" in capsys.readouterr().out
    ((key, entry),) = compilation.read_record().items()
    assert entry["gain"] == 2
    assert "evaluation" in key
    assert "float32" in key


def test_a_short_run_is_neither_measured_nor_compiled(monkeypatch):
    def fail(*arguments):
        raise AssertionError("measured")

    monkeypatch.setattr(compilation, "seconds_of", fail)
    assert not compile_if_it_pays_([freeze_(network())], fail, compilation.MIN_CALLS - 1, CPU, "evaluation")


def test_a_run_that_ends_before_compiling_would_have_paid_is_not_compiled(monkeypatch, capsys):
    answer, net = decide(monkeypatch, plain_sec=0.0005, fast_sec=0.00025)  # 50 s in all; compiling takes 120
    assert not answer
    assert not is_compiled(net)
    assert capsys.readouterr().out == ""


def test_the_record_of_a_machine_decides_the_next_time(monkeypatch):
    key = compilation._key([freeze_(network())], CPU, "evaluation")
    compilation.write_record(key, seconds=10, gain=2)
    assert decide(monkeypatch, plain_sec=0.0005, fast_sec=0.00025)[0]  # 50 s in all: 25 - 10 s are saved
    compilation.write_record(key, seconds=10, gain=0.9)
    assert not decide(monkeypatch, plain_sec=10.0, fast_sec=5.0)[0]


def test_a_network_that_is_no_faster_compiled_stays_as_it_was(monkeypatch, capsys):
    answer, net = decide(monkeypatch, plain_sec=0.1, fast_sec=0.11)
    assert not answer
    assert not is_compiled(net)
    assert "no faster" in capsys.readouterr().out


def test_a_compiler_that_fails_costs_a_warning(monkeypatch, capsys):
    def broken(graph, inputs):
        raise RuntimeError("no ptxas")

    answer, net = decide(monkeypatch, plain_sec=0.1, fast_sec=0.05, backend=broken)
    assert not answer
    assert not is_compiled(net)
    assert "torch.compile failed" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", "[]", '{"a": 1}', '{"a": {"seconds": "x", "gain": 1}}'])
def test_a_damaged_record_counts_as_none(text):
    path = compilation.cache_folder() / compilation.RECORD_NAME
    path.parent.mkdir(parents=True)
    path.write_text(text)
    assert compilation.read_record() == {}


def test_without_a_compiler_a_cpu_refuses_in_one_line(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ValueError, match="needs a C\\+\\+ compiler"):
        compile_(network())


# ---- training


def gradients(net: Precond, recompute: bool = False) -> dict[str, torch.Tensor]:
    """The gradients of a step in training, without dropout."""
    net.train()
    if recompute:
        net.recompute_in_training_()
    (net(*example(net)) - 1).square().mean().backward()
    return {name: parameter.grad for name, parameter in net.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize(
    ("backend", "recompute"),
    [
        ("eager", False),
        ("eager", True),
        pytest.param("inductor", False, marks=pytest.mark.slow),
        pytest.param("inductor", True, marks=pytest.mark.slow),
    ],
)
def test_a_training_step_is_one_graph_with_the_gradients_of_eager_code(backend, recompute):
    plain, net = network(), network()
    compile_(net, backend)  # raises an error if there are two graphs
    expected, found = gradients(plain, recompute), gradients(net, recompute)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-5, rtol=1e-5, msg=name)
    assert list(net.state_dict()) == list(plain.state_dict())
    for parameter in net.parameters():
        parameter.grad = None
    again = gradients(net)
    assert all(torch.equal(again[name], gradient) for name, gradient in found.items())


def test_training_with_augmentation_labels_is_compiled_too():
    plain, net = network(augment_dim=9), network(augment_dim=9)
    compile_(net, "eager")
    compiled = torch._dynamo.utils.counters["stats"]
    compiled.clear()
    for scale in (0.0, 1.0, 2.0):
        labels = scale * torch.eye(9)[:2]
        expected = plain.train()(*example(plain), augment=labels)
        torch.testing.assert_close(net.train()(*example(net), augment=labels), expected, atol=1e-5, rtol=1e-5)
        assert compiled["unique_graphs"] == 1


# ---- CUDA graphs


class FakeGraph:
    """Replays by running again what was captured, into the memory that the capture answered in."""

    captured: list["FakeGraph"] = []

    def replay(self):
        self.answer.copy_(self.function(*self.args))


@pytest.fixture
def cuda_graphs(monkeypatch):
    """Stand-ins for CUDA's graphs and streams; returns the graphs captured so far."""
    graphs: list[FakeGraph] = []

    class Stream:
        def wait_stream(self, other):
            pass

    @contextlib.contextmanager
    def capture(graph):
        graphs.append(graph)
        yield

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    return graphs


class Recorded(GraphedCall):
    """Tells a stand-in graph what it has captured."""

    def _capture(self, args):
        calls = []

        def function(*own):
            calls.append(own)
            return inner(*own)

        inner, self.function = self.function, function
        held, graph, answer = super()._capture(args)
        self.function = inner
        graph.function, graph.args, graph.answer = inner, calls[-1], answer
        return held, graph, answer


def test_graphed_calls_answer_the_same_bits_for_each_shape_and_each_input(cuda_graphs):
    net, plain = freeze_(network()), freeze_(network())
    net.fast_raw = Recorded(net.raw)
    x, sigma, labels = example(net, 3)
    with torch.no_grad():
        first, second = net(x, sigma, labels), net(2 * x, sigma / 2, labels.flip(0))
        assert torch.equal(first, plain(x, sigma, labels))  # and is not overwritten by the second call
        assert torch.equal(second, plain(2 * x, sigma / 2, labels.flip(0)))
        assert torch.equal(net(x[:1], sigma[:1], labels[:1]), plain(x[:1], sigma[:1], labels[:1]))
    assert len(cuda_graphs) == 2


def test_edited_calls_and_gradients_are_not_graphed(cuda_graphs):
    net = freeze_(network())
    net.fast_raw = Recorded(net.raw)
    x, sigma, labels = example(net)
    with torch.no_grad():
        net(x, sigma, labels, embedding=lambda emb: emb)
    net(x.requires_grad_(), sigma, labels).sum().backward()
    assert cuda_graphs == []
    assert x.grad is not None


def test_what_is_captured_makes_the_host_wait_for_nothing(cuda_graphs):
    with DEVICE:
        net = freeze_(network())
    with FakeGPU() as gpu, torch.no_grad():
        net.fast_raw = Recorded(net.raw)
        args = [torch.empty(2, 3, 8, 8), torch.empty(2), torch.empty(2, 4)]
        net(*(arg.to(DEVICE, non_blocking=True) for arg in args))
    assert gpu.mixed == gpu.waits == []
    assert len(cuda_graphs) == 1


def test_cuda_graphs_are_refused_elsewhere():
    with pytest.raises(ValueError, match="need an NVIDIA GPU"):
        graph_(network(), CPU)
