"""The remote code of the stand-in checkpoint: ChatGLM-6B of 2023 written anew, small enough to read.

Classes, functions, tensor names and the order of the arithmetic are upstream's, so every tool meets here
what it meets in the real checkpoint. That includes the statements of the original that trouble an exporter;
they stand here unmarked, as they do there.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn import CrossEntropyLoss, LayerNorm
from torch.nn.utils import skip_init
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import logging

from .configuration_chatglm import ChatGLMConfig

logger = logging.get_logger(__name__)


def default_init(cls, *args, **kwargs):
    return cls(*args, **kwargs)


@torch.jit.script
def gelu_impl(x):
    """GELU, tanh approximation."""
    return 0.5 * x * (1.0 + torch.tanh(0.79788456 * x * (1.0 + 0.044715 * x * x)))


def gelu(x):
    return gelu_impl(x)


class RotaryEmbedding(torch.nn.Module):
    """cos and sin tables of one half of a head, kept on the module between calls."""

    def __init__(self, dim, base=10000, precision=torch.half, learnable=False):
        super().__init__()
        exponents = torch.arange(0, dim, 2, dtype=torch.float32) / dim
        self.register_buffer("inv_freq", (base**-exponents).half())
        self.learnable = learnable
        self.precision = precision
        self.max_seq_len_cached = None
        self.cos_cached = None
        self.sin_cached = None

    def _load_from_state_dict(self, state_dict, prefix, *args):
        """The stored inv_freq is ignored: the one computed above is used."""

    def forward(self, x, seq_dim=1, seq_len=None):
        if seq_len is None:
            seq_len = x.shape[seq_dim]
        # one row per position; the frequencies stand twice, for both halves that rotate_half exchanges
        if self.max_seq_len_cached is None or (seq_len > self.max_seq_len_cached):
            self.max_seq_len_cached = seq_len
            # position times frequency, in the dtype of the frequencies
            t = torch.arange(seq_len, device=x.device, dtype=self.inv_freq.dtype)
            freqs = torch.einsum("i,j->ij", t, self.inv_freq)
            angles = torch.cat((freqs, freqs), dim=-1)
            self.cos_cached = angles.cos()[:, None, :]
            self.sin_cached = angles.sin()[:, None, :]
        return self.cos_cached[:seq_len, ...], self.sin_cached[:seq_len, ...]

    def _apply(self, fn):
        if self.cos_cached is not None:
            self.cos_cached = fn(self.cos_cached)
            self.sin_cached = fn(self.sin_cached)
        return super()._apply(fn)


def rotate_half(x):
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), dim=-1)


@torch.jit.script_if_tracing
def apply_rotary_pos_emb_index(q, k, cos, sin, position_id):
    # q, k: (sequence, batch, heads, d/2); position_id: (sequence, batch); cos, sin: (length, 1, d/2)
    # one row of each table for every token
    # fmt: off
    cos, sin = F.embedding(position_id, cos.squeeze(1)).unsqueeze(2), \
        F.embedding(position_id, sin.squeeze(1)).unsqueeze(2)
    # fmt: on
    q, k = (q * cos) + (rotate_half(q) * sin), (k * cos) + (rotate_half(k) * sin)
    return q, k


def attention_fn(
    self,
    query_layer,
    key_layer,
    value_layer,
    attention_mask,
    hidden_size_per_partition,
    layer_id,
    layer_past=None,
    scaling_attention_score=True,
    use_cache=False,
):
    """Attention over (sequence, batch, heads, d); the cache grows along dimension 0."""
    if layer_past is not None:
        past_key, past_value = layer_past[0], layer_past[1]
        key_layer = torch.cat((past_key, key_layer), dim=0)
        value_layer = torch.cat((past_value, value_layer), dim=0)
    present = (key_layer, value_layer) if use_cache else None

    # Dividing by (layer + 1) here and multiplying after the mask keeps fp16 scores from overflowing.
    query_key_layer_scaling_coeff = float(layer_id + 1)
    if scaling_attention_score:
        query_layer = query_layer / (math.sqrt(query_layer.shape[-1]) * query_key_layer_scaling_coeff)

    sequence, batch, heads, head_size = query_layer.shape
    total = key_layer.shape[0]
    queries = query_layer.reshape(sequence, batch * heads, head_size).transpose(0, 1)
    keys = key_layer.reshape(total, batch * heads, head_size).permute(1, 2, 0)
    attention_scores = torch.matmul(queries, keys).view(batch, heads, sequence, total)

    # True hides: after the softmax, a score of -10000 is a probability of 0
    if not (attention_mask == 0).all():
        attention_scores.masked_fill_(attention_mask, -10000.0)
    dtype = attention_scores.dtype
    attention_scores = attention_scores.float() * query_key_layer_scaling_coeff
    attention_probs = F.softmax(attention_scores, dim=-1).to(dtype)

    values = value_layer.reshape(total, batch * heads, head_size).transpose(0, 1)
    context_layer = torch.matmul(attention_probs.view(batch * heads, sequence, total), values)
    context_layer = context_layer.view(batch, heads, sequence, head_size).permute(2, 0, 1, 3)
    context_layer = context_layer.reshape(sequence, batch, hidden_size_per_partition)
    return context_layer, present, attention_probs


class SelfAttention(torch.nn.Module):
    def __init__(
        self, hidden_size, num_attention_heads, layer_id, bias=True, params_dtype=torch.float,
        position_encoding_2d=True, empty_init=True,
    ):  # fmt: skip
        super().__init__()
        init_method = skip_init if empty_init else default_init
        self.layer_id = layer_id
        self.hidden_size = hidden_size
        self.hidden_size_per_partition = hidden_size
        self.num_attention_heads = num_attention_heads
        self.num_attention_heads_per_partition = num_attention_heads
        self.hidden_size_per_attention_head = hidden_size // num_attention_heads
        self.position_encoding_2d = position_encoding_2d
        rotary_size = self.hidden_size_per_attention_head // (2 if position_encoding_2d else 1)
        self.rotary_emb = RotaryEmbedding(rotary_size, base=10000, precision=torch.half)
        self.query_key_value = init_method(nn.Linear, hidden_size, 3 * hidden_size, bias=bias, dtype=params_dtype)
        self.dense = init_method(nn.Linear, hidden_size, hidden_size, bias=bias, dtype=params_dtype)

    def forward(
        self, hidden_states, position_ids, attention_mask, layer_id, layer_past=None, use_cache=False,
        output_attentions=False,
    ):  # fmt: skip
        # (sequence, batch, hidden) -> three of (sequence, batch, heads, d); q, k and v lie side by side inside each head
        mixed = self.query_key_value(hidden_states)
        mixed = mixed.view(
            *mixed.shape[:-1], self.num_attention_heads_per_partition, 3 * self.hidden_size_per_attention_head
        )
        query_layer, key_layer, value_layer = mixed.chunk(3, dim=-1)

        if self.position_encoding_2d:
            q1, q2 = query_layer.chunk(2, dim=-1)
            k1, k2 = key_layer.chunk(2, dim=-1)
            # one half of each head is rotated by the position, the other by the block position
            cos, sin = self.rotary_emb(q1, seq_len=position_ids.max() + 1)
            position_ids, block_position_ids = (
                position_ids[:, 0, :].transpose(0, 1).contiguous(),
                position_ids[:, 1, :].transpose(0, 1).contiguous(),
            )
            q1, k1 = apply_rotary_pos_emb_index(q1, k1, cos, sin, position_ids)
            q2, k2 = apply_rotary_pos_emb_index(q2, k2, cos, sin, block_position_ids)
            query_layer = torch.cat((q1, q2), dim=-1)
            key_layer = torch.cat((k1, k2), dim=-1)
        else:
            position_ids = position_ids.transpose(0, 1)
            cos, sin = self.rotary_emb(value_layer, seq_len=position_ids.max() + 1)
            query_layer, key_layer = apply_rotary_pos_emb_index(query_layer, key_layer, cos, sin, position_ids)

        context_layer, present, attention_probs = attention_fn(
            self=self,
            query_layer=query_layer,
            key_layer=key_layer,
            value_layer=value_layer,
            attention_mask=attention_mask,
            hidden_size_per_partition=self.hidden_size_per_partition,
            layer_id=layer_id,
            layer_past=layer_past,
            use_cache=use_cache,
        )
        outputs = (self.dense(context_layer), present)
        return outputs + (attention_probs,) if output_attentions else outputs


class GEGLU(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.activation_fn = F.gelu

    def forward(self, x):
        x1, x2 = x.chunk(2, dim=-1)
        return x1 * self.activation_fn(x2)


class GLU(torch.nn.Module):
    """The feed-forward part; despite its name it has no gate."""

    def __init__(
        self, hidden_size, inner_hidden_size=None, layer_id=None, bias=True, activation_func=gelu,
        params_dtype=torch.float, empty_init=True,
    ):  # fmt: skip
        super().__init__()
        init_method = skip_init if empty_init else default_init
        self.layer_id = layer_id
        self.activation_func = activation_func
        self.hidden_size = hidden_size
        self.inner_hidden_size = 4 * hidden_size if inner_hidden_size is None else inner_hidden_size
        self.dense_h_to_4h = init_method(
            nn.Linear, self.hidden_size, self.inner_hidden_size, bias=bias, dtype=params_dtype
        )
        self.dense_4h_to_h = init_method(
            nn.Linear, self.inner_hidden_size, self.hidden_size, bias=bias, dtype=params_dtype
        )

    def forward(self, hidden_states):
        return self.dense_4h_to_h(self.activation_func(self.dense_h_to_4h(hidden_states)))


class GLMBlock(torch.nn.Module):
    def __init__(
        self, hidden_size, num_attention_heads, layernorm_epsilon, layer_id, inner_hidden_size=None,
        use_bias=True, params_dtype=torch.float, num_layers=28, position_encoding_2d=True, empty_init=True,
    ):  # fmt: skip
        super().__init__()
        self.layer_id = layer_id
        self.input_layernorm = LayerNorm(hidden_size, eps=layernorm_epsilon)
        self.attention = SelfAttention(
            hidden_size, num_attention_heads, layer_id, bias=use_bias, params_dtype=params_dtype,
            position_encoding_2d=position_encoding_2d, empty_init=empty_init,
        )  # fmt: skip
        self.post_attention_layernorm = LayerNorm(hidden_size, eps=layernorm_epsilon)
        self.num_layers = num_layers
        self.mlp = GLU(
            hidden_size, inner_hidden_size=inner_hidden_size, bias=use_bias, layer_id=layer_id,
            params_dtype=params_dtype, empty_init=empty_init,
        )  # fmt: skip

    def forward(
        self, hidden_states, position_ids, attention_mask, layer_id, layer_past=None, use_cache=False,
        output_attentions=False,
    ):  # fmt: skip
        # The residual is the LayerNorm's output, scaled by alpha. Nobody passes num_layers on: alpha is always sqrt(56).
        alpha = (2 * self.num_layers) ** 0.5
        attention_input = self.input_layernorm(hidden_states)
        attention_outputs = self.attention(
            attention_input, position_ids, attention_mask=attention_mask, layer_id=layer_id,
            layer_past=layer_past, use_cache=use_cache, output_attentions=output_attentions,
        )  # fmt: skip
        hidden_states = attention_input * alpha + attention_outputs[0]
        mlp_input = self.post_attention_layernorm(hidden_states)
        output = mlp_input * alpha + self.mlp(mlp_input)
        return (output,) + (attention_outputs[1:] if use_cache else attention_outputs[2:])


class ChatGLMPreTrainedModel(PreTrainedModel):
    """Masks, positions and loading, shared by the two models below."""

    is_parallelizable = False
    supports_gradient_checkpointing = True
    config_class = ChatGLMConfig
    base_model_prefix = "transformer"
    _no_split_modules = ["GLMBlock"]

    def _init_weights(self, module: nn.Module):
        """Weights come from a checkpoint or from the trainer."""

    def get_masks(self, input_ids, device):
        """(batch, 1, S, S) bool, True = hidden. The prompt up to <sop> sees all of itself."""
        batch_size, seq_length = input_ids.shape
        visible = torch.ones((batch_size, seq_length, seq_length), device=device).tril_()
        for row, seq in zip(visible, input_ids):
            row[:, : seq.tolist().index(self.config.bos_token_id)] = 1
        return (visible < 0.5).unsqueeze(1)

    def get_position_ids(self, input_ids, mask_positions, device, use_gmasks=None):
        """(batch, 2, S): positions that stop at [gMASK], and block positions that start behind <sop>."""
        batch_size, seq_length = input_ids.shape
        position_ids = torch.arange(seq_length, dtype=torch.long, device=device).repeat(batch_size, 1)
        if not self.position_encoding_2d:
            return position_ids
        block_position_ids = torch.zeros_like(position_ids)
        for row, seq in enumerate(input_ids.tolist()):
            start = seq.index(self.config.bos_token_id)
            position_ids[row, start:] = mask_positions[row]
            block_position_ids[row, start:] = torch.arange(1, seq_length - start + 1, device=device)
        return torch.stack((position_ids, block_position_ids), dim=1)


class ChatGLMModel(ChatGLMPreTrainedModel):
    def __init__(self, config: ChatGLMConfig, empty_init=True):
        super().__init__(config)
        init_method = skip_init if empty_init else default_init
        self.max_sequence_length = config.max_sequence_length
        self.hidden_size = config.hidden_size
        self.params_dtype = torch.half
        self.num_attention_heads = config.num_attention_heads
        self.vocab_size = config.vocab_size
        self.num_layers = config.num_layers
        self.layernorm_epsilon = config.layernorm_epsilon
        self.inner_hidden_size = config.inner_hidden_size
        self.hidden_size_per_attention_head = self.hidden_size // self.num_attention_heads
        self.position_encoding_2d = config.position_encoding_2d
        self.gradient_checkpointing = False

        self.word_embeddings = init_method(
            torch.nn.Embedding, num_embeddings=self.vocab_size, embedding_dim=self.hidden_size, dtype=self.params_dtype
        )

        def get_layer(layer_id):
            return GLMBlock(
                self.hidden_size, self.num_attention_heads, self.layernorm_epsilon, layer_id,
                inner_hidden_size=self.inner_hidden_size, params_dtype=self.params_dtype,
                position_encoding_2d=self.position_encoding_2d, empty_init=empty_init,
            )  # fmt: skip

        self.layers = torch.nn.ModuleList([get_layer(layer_id) for layer_id in range(self.num_layers)])
        self.final_layernorm = LayerNorm(self.hidden_size, eps=self.layernorm_epsilon)

    def get_input_embeddings(self):
        return self.word_embeddings

    def set_input_embeddings(self, new_embeddings):
        self.word_embeddings = new_embeddings

    def _mask_positions(self, input_ids):
        gmask, mask = self.config.gmask_token_id, self.config.mask_token_id
        return [seq.index(gmask if gmask in seq else mask) for seq in input_ids.tolist()]

    def forward(
        self, input_ids=None, position_ids=None, attention_mask=None, past_key_values=None, inputs_embeds=None,
        use_cache=None, output_attentions=None, output_hidden_states=None, return_dict=None,
    ):  # fmt: skip
        use_cache = use_cache if use_cache is not None else self.config.use_cache
        if past_key_values is None:
            past_key_values = tuple([None] * len(self.layers))
            if attention_mask is None:
                attention_mask = self.get_masks(input_ids, device=input_ids.device)
            if position_ids is None:
                position_ids = self.get_position_ids(
                    input_ids, mask_positions=self._mask_positions(input_ids), device=input_ids.device
                )
        if inputs_embeds is None:
            inputs_embeds = self.word_embeddings(input_ids)

        hidden_states = inputs_embeds.transpose(0, 1)  # (sequence, batch, hidden)
        presents = () if use_cache else None
        all_self_attentions = () if output_attentions else None
        all_hidden_states = () if output_hidden_states else None
        if attention_mask is None:
            attention_mask = torch.zeros(1, 1, device=input_ids.device).bool()
        else:
            attention_mask = attention_mask.to(hidden_states.device)

        for i, layer in enumerate(self.layers):
            if output_hidden_states:
                all_hidden_states = all_hidden_states + (hidden_states,)
            layer_past = past_key_values[i]
            if self.gradient_checkpointing and self.training:
                layer_ret = torch.utils.checkpoint.checkpoint(
                    layer, hidden_states, position_ids, attention_mask,
                    torch.tensor(i), layer_past, use_cache, output_attentions, use_reentrant=False,
                )  # fmt: skip
            else:
                # every layer adds its own key and value to its past
                layer_ret = layer(
                    hidden_states, position_ids=position_ids, attention_mask=attention_mask,
                    layer_id=torch.tensor(i), layer_past=layer_past, use_cache=use_cache,
                    output_attentions=output_attentions,
                )  # fmt: skip
            hidden_states = layer_ret[0]
            if use_cache:
                presents = presents + (layer_ret[1],)
            if output_attentions:
                all_self_attentions = all_self_attentions + (layer_ret[2 if use_cache else 1],)

        hidden_states = self.final_layernorm(hidden_states)
        if output_hidden_states:
            all_hidden_states = all_hidden_states + (hidden_states,)
        if not return_dict:
            parts = (hidden_states, presents, all_hidden_states, all_self_attentions)
            return tuple(part for part in parts if part is not None)
        return BaseModelOutputWithPast(
            last_hidden_state=hidden_states,
            past_key_values=presents,
            hidden_states=all_hidden_states,
            attentions=all_self_attentions,
        )


class ChatGLMForConditionalGeneration(ChatGLMPreTrainedModel):
    def __init__(self, config: ChatGLMConfig, empty_init=True):
        super().__init__(config)
        init_method = skip_init if empty_init else default_init
        self.max_sequence_length = config.max_sequence_length
        self.position_encoding_2d = config.position_encoding_2d
        self.transformer = ChatGLMModel(config, empty_init=empty_init)
        self.lm_head = init_method(nn.Linear, config.hidden_size, config.vocab_size, bias=False, dtype=torch.half)
        self.config = config
        if self.config.quantization_bit:
            self.quantize(self.config.quantization_bit)

    def get_output_embeddings(self):
        return self.lm_head

    def set_output_embeddings(self, new_embeddings):
        self.lm_head = new_embeddings

    def prepare_inputs_for_generation(
        self, input_ids, past_key_values=None, attention_mask=None, position_ids=None, **kwargs
    ):
        """The whole prompt on the first call; afterwards the last token, its two positions and no mask."""
        positions = self.transformer._mask_positions(input_ids)
        if past_key_values is None:
            return {"input_ids": input_ids, "past_key_values": None}
        context_lengths = [seq.index(self.config.bos_token_id) for seq in input_ids.tolist()]
        rows = [[[at], [input_ids.shape[1] - length]] for at, length in zip(positions, context_lengths)]
        return {
            "input_ids": input_ids[:, -1:],
            "past_key_values": past_key_values,
            "position_ids": torch.tensor(rows, dtype=torch.long, device=input_ids.device),
        }

    def forward(
        self, input_ids=None, position_ids=None, attention_mask=None, past_key_values=None, inputs_embeds=None,
        labels=None, use_cache=None, output_attentions=None, output_hidden_states=None, return_dict=None,
    ):  # fmt: skip
        use_cache = use_cache if use_cache is not None else self.config.use_cache
        return_dict = return_dict if return_dict is not None else True
        transformer_outputs = self.transformer(
            input_ids=input_ids, position_ids=position_ids, attention_mask=attention_mask,
            past_key_values=past_key_values, inputs_embeds=inputs_embeds, use_cache=use_cache,
            output_attentions=output_attentions, output_hidden_states=output_hidden_states, return_dict=return_dict,
        )  # fmt: skip
        lm_logits = self.lm_head(transformer_outputs[0]).permute(1, 0, 2).contiguous()
        loss = None
        if labels is not None:
            # Token n predicts token n + 1; the loss is computed in fp32.
            shifted = lm_logits[..., :-1, :].float()
            loss = CrossEntropyLoss(ignore_index=-100)(
                shifted.reshape(-1, shifted.size(-1)), labels[..., 1:].reshape(-1)
            )
        if not return_dict:
            output = (lm_logits,) + transformer_outputs[1:]
            return ((loss,) + output) if loss is not None else output
        return CausalLMOutputWithPast(
            loss=loss,
            logits=lm_logits,
            past_key_values=transformer_outputs.past_key_values,
            hidden_states=transformer_outputs.hidden_states,
            attentions=transformer_outputs.attentions,
        )

    @staticmethod
    def _reorder_cache(past, beam_idx):
        return tuple(tuple(part.index_select(1, beam_idx.to(part.device)) for part in layer) for layer in past)

    def quantize(self, bits: int):
        from .quantization import quantize

        self.transformer = quantize(self.transformer, bits)
        return self
