"""A small KV-Distill model on Megatron in float64, for the engine's tests. What is imported late needs the host made ready first."""

import torch

from kvcat_nemo.method.kvdistill import KVDistillConfig
from tests.engine.small_models import VOCAB, build, enliven, transformer_config

TOKENS, WINDOWS, MICROBATCHES = 12, 3, 2


def distill_config(**fields):
    defaults = {
        "scorer_layer": 2,
        "lora_rank": 3,
        "lora_alpha": 4.0,
        "always_keep": 1,
        "gate_gradient_cap": 80.0,
    }
    return KVDistillConfig(**defaults | fields)


def model_of(distill, padded_vocab=VOCAB, vp_stage=None, **fields):
    from kvcat_nemo.engine.kvdistill.config import KVDistillTransformerConfig, paired_settings
    from kvcat_nemo.engine.kvdistill.layer import KVDistillTransformerLayer
    from kvcat_nemo.engine.kvdistill.model import KVDistillGPTModel
    from kvcat_nemo.engine.spec import kvcat_block_spec

    plain = transformer_config("none, untied", **fields)
    names = {name for name, f in plain.__dataclass_fields__.items() if f.init} - {"kvcat"}
    config = KVDistillTransformerConfig(
        **{name: getattr(plain, name) for name in names}, kvcat=paired_settings(distill), kvdistill=distill
    )

    def model(config, _, **settings):
        spec = kvcat_block_spec(config, vp_stage, KVDistillTransformerLayer)
        return KVDistillGPTModel(config, spec, true_vocab_size=VOCAB, **settings)

    built = build(config, False, cls=model, padded_vocab=padded_vocab, max_tokens=TOKENS)
    enliven(built)
    return built


def microbatches(count=MICROBATCHES):
    """A step's micro-batches: (tokens, labels, lengths of contexts), the same for every layout."""
    rng = torch.Generator().manual_seed(3)
    for _ in range(count):
        text = torch.randint(0, VOCAB, (WINDOWS, TOKENS + 1), generator=rng)
        yield text[:, :-1], text[:, 1:], torch.randint(2, TOKENS - 1, (WINDOWS,), generator=rng)


def train_step(model, ddp, dp_rank=0, dp=1):
    """Forward and backward of the global batch by Megatron's schedule. Returns the step's figures."""
    from megatron.core.distributed import finalize_model_grads
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from kvcat_nemo.engine.kvdistill.model import batch_rows
    from kvcat_nemo.engine.step import microbatch_loss, step_metrics

    config = model.config
    config.finalize_model_grads_func = finalize_model_grads
    mine = list(microbatches())[dp_rank::dp]
    position = torch.arange(TOKENS).expand(WINDOWS, TOKENS)

    def forward_step(iterator, model):
        number, (tokens, labels, lengths) = next(iterator)
        behind = (torch.arange(TOKENS) >= lengths[:, None]).double()
        known = {"loss_mask": behind} if number % 2 else {}
        out = model(tokens, position, labels=labels, context_lengths=lengths, **known)
        return out, lambda metrics: microbatch_loss(metrics, behind, config.kvcat)

    ddp.zero_grad_buffer()
    sums = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter(list(enumerate(mine))),
        model=[ddp],
        num_microbatches=len(mine),
        seq_length=TOKENS,
        micro_batch_size=batch_rows(WINDOWS),
        forward_only=False,
    )
    return step_metrics(sums, [ddp], config.kvcat)
