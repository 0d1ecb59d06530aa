"""Every LoRA rank of a long sweep is compiled, by no switch that holds for the whole process."""

import torch

from deltarank.study import training
from deltarank.study.profiles import profile


def test_slow_the_ninth_graph_is_compiled_too(store, monkeypatch):
    """Two graphs a rank, by a backend that runs them as they are; torch stops at 8 of its own."""
    graphs, limit = [], torch.compiler.config.recompile_limit
    compile_module = torch.nn.Module.compile

    def run_as_it_is(graph, inputs):
        graphs.append(graph)
        return graph

    monkeypatch.setattr(
        torch.nn.Module,
        "compile",
        lambda module, **how: compile_module(module, backend=run_as_it_is, **how),
    )
    monkeypatch.setattr(training, "has_compiler", lambda: True)
    torch.compiler.reset()
    for rank in range(1, 7):
        before = len(graphs)
        config = profile().config("facts", "lora", rank=rank, steps=1, compile=True)
        training.train(config, training.prepare(config))
        assert len(graphs) > before
    assert len(graphs) > limit == torch.compiler.config.recompile_limit
    torch.compiler.reset()
