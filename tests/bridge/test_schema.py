"""What newer servers are told, which 0.3.75 has no place for."""

from dataclasses import dataclass, field

import pytest
import torch

cli_args = pytest.importorskip("comfy.cli_args", reason="put a ComfyUI folder on PYTHONPATH to run this")
if not torch.cuda.is_available():
    cli_args.args.cpu = True  # before comfy.model_management looks for a GPU

from comfy_api.latest import io  # noqa: E402
from wan_sharded.nodes.export import WanShardedVideoExport  # noqa: E402
from wan_sharded.nodes.loader import WanShardedLoader  # noqa: E402
from wan_sharded.nodes.lora import WanShardedLora  # noqa: E402
from wan_sharded.nodes.sampler import WanShardedI2VSampler  # noqa: E402

NODES = (WanShardedLoader, WanShardedLora, WanShardedI2VSampler, WanShardedVideoExport)


@pytest.mark.parametrize("node", NODES)
def test_other_words_that_find_a_node(node: type[io.ComfyNode], monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclass
    class NewerSchema(io.Schema):
        search_aliases: list[str] = field(default_factory=list)

    assert node.define_schema().node_id, "a server without them takes the rest"
    monkeypatch.setattr(io, "Schema", NewerSchema)
    schema = node.define_schema()
    assert isinstance(schema, NewerSchema)
    aliases = schema.search_aliases
    assert len(aliases) == len({alias.lower() for alias in aliases}) >= 4
    assert all(alias and alias.strip() == alias for alias in aliases)
