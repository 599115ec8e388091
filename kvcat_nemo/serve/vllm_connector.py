"""vLLM's side of a compressed document: a KV connector that says "these tokens are there already" and writes them into pages.

The scheduler asks how many tokens of a request come from outside: those of its document that the engine's own prefix cache does
not hold. The worker writes these into the pages that the scheduler gave, through each layer's own `do_kv_cache_update`, which
knows the backend's layout and dtype. A second request for the document finds its pages in the engine's prefix cache.

A request names its document in kv_transfer_params["kvcat"]; only serve/gate.py sets that, from what the server was started with.

Runs in vLLM's engine process (version 0.32). Shapes: N tokens, G KV heads, D head dim.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
)
from vllm.logger import init_logger

from kvcat_nemo.serve.document import read_document
from kvcat_nemo.serve.gate import KEY

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request

logger = init_logger("vllm.kvcat")


@dataclass
class Load:
    """Slots `first` to `last` of a document go into the pages `blocks` of a request."""

    document: str
    first: int
    last: int
    blocks: list[int]
    """Of the whole request, from its first token on."""


@dataclass
class Loads(KVConnectorMetadata):
    """What a step's worker writes."""

    loads: list[Load] = field(default_factory=list)


class CompressedDocuments(KVConnectorBase_V1):
    """Serves documents named in kv_connector_extra_config["documents"]: name → {path, sha256, slots}."""

    def __init__(self, vllm_config, role: KVConnectorRole, kv_cache_config=None):
        super().__init__(vllm_config=vllm_config, role=role, kv_cache_config=kv_cache_config)
        self.documents: dict[str, dict[str, Any]] = self._kv_transfer_config.get_from_extra_config(
            "documents", {}
        )
        self.block_size = vllm_config.cache_config.block_size
        self.waiting: list[Load] = []
        self.layers: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}
        if role == KVConnectorRole.WORKER:
            parallel = vllm_config.parallel_config
            if parallel.tensor_parallel_size != 1 or parallel.pipeline_parallel_size != 1:
                raise ValueError(
                    f"tensor_parallel_size={parallel.tensor_parallel_size}, pipeline_parallel_size="
                    f"{parallel.pipeline_parallel_size}: compressed documents are served by one worker; set both to 1"
                )
            for name, known in self.documents.items():
                # Once for all requests: [N, G, D] of each layer, as attention layers take tokens.
                _, cache = read_document(known["path"], sha256=known["sha256"])
                self.layers[name] = [
                    tuple(x[0].transpose(0, 1).contiguous() for x in layer.read()) for layer in cache.layers
                ]

    # The scheduler's side.

    def get_num_new_matched_tokens(
        self, request: Request, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        """Tokens of the request's document beyond those that the engine has."""
        name = _document_of(request)
        if name is None:
            return 0, False
        return max(0, self.documents[name]["slots"] - num_computed_tokens), False

    def update_state_after_alloc(self, request: Request, blocks, num_external_tokens: int) -> None:
        """Note the pages that are to be written before the request's first step."""
        name = _document_of(request)
        if name is None or num_external_tokens == 0:
            return
        slots = self.documents[name]["slots"]
        self.waiting.append(Load(name, slots - num_external_tokens, slots, list(blocks.get_block_ids()[0])))

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        """Hand over what was noted since the last step."""
        loads, self.waiting = self.waiting, []
        return Loads(loads)

    # The worker's side.

    def start_load_kv(self, forward_context, **kwargs: Any) -> None:
        """Write the documents of this step's new requests into their pages."""
        metadata = self._get_connector_metadata()
        if not metadata.loads:
            return
        attention = [
            layer
            for layer in forward_context.no_compile_layers.values()
            if getattr(layer, "kv_cache", None) is not None
        ]
        for load in metadata.loads:
            slots = self._slot_mapping(load)
            for layer, (keys_NGD, values_NGD) in zip(attention, self.layers[load.document], strict=True):
                cache = layer.kv_cache
                device = cache.device
                key, value = (x[load.first : load.last].to(device) for x in (keys_NGD, values_NGD))
                layer.impl.do_kv_cache_update(layer, key, value, cache, slots.to(device))

    def _slot_mapping(self, load: Load) -> torch.Tensor:
        """Where in the engine's pages each token goes, [N] int64."""
        token = torch.arange(load.first, load.last)
        block = torch.tensor(load.blocks)[token // self.block_size]
        return block * self.block_size + token % self.block_size

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing is under way: `start_load_kv` returns when all is written."""

    def save_kv_layer(self, layer_name: str, kv_layer, attn_metadata, **kwargs: Any) -> None:
        """Nothing is kept of what the engine computes."""

    def wait_for_save(self) -> None:
        """Nothing is kept of what the engine computes."""


def _document_of(request: Request) -> str | None:
    parameters = request.kv_transfer_params
    return parameters.get(KEY) if parameters else None
