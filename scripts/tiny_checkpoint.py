"""Write a tiny, random Wan 2.2 image-to-video checkpoint in diffusers format, made of the real classes.

It has everything the published one has (two different experts, UMT5, the video VAE, a tokenizer, the scheduler), in a few megabytes: a
video of 128 x 96 x 17 takes about a second on a CPU. The block and head counts are odd on purpose. The weights are random, so its videos are
noise; but every block, the text, the image and the timestep change the output, so that a forgotten one shows in a test.

    python scripts/tiny_checkpoint.py FOLDER [--seed N] [--dtype float32|bf16|fp16] [--num-blocks N] [--num-heads N] [--sharded]

Used by scripts/demo.py and by the ``tiny_checkpoint`` fixture of the tests.
"""

import argparse
import io
import json
import math
import shutil
import tempfile
from pathlib import Path

import sentencepiece
import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanImageToVideoPipeline, WanTransformer3DModel
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerBase, T5TokenizerFast, UMT5Config, UMT5EncoderModel

HEAD_DIM = 16
TEXT_DIM = 32
DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# What the tokenizer is trained on. It knows the characters that occur here, and ASCII.
TOKENIZER_TEXT = """
A sailing boat drifts slowly across a calm lake at sunset, gentle waves, warm light on the hills, cinematic, high quality.
The camera moves closer while the clouds pass over the mountains and the water reflects the sky.
A woman walks through a quiet street in the rain and looks at the lights of the shops. She smiles and turns to the camera.
A white cat wearing sunglasses sits on a surfboard. The fluffy animal gazes directly at the viewer with a relaxed expression.
Static, blurred details, subtitles, overexposed, worst quality, low quality, ugly, deformed, extra fingers, still picture.
色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，丑陋的，
残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，
三条腿，背景人很多，倒着走。一只小船在平静的湖面上缓缓漂过，夕阳下的山，温暖的光，水面倒映着天空。
""".strip()


def make_tokenizer(model_file: Path) -> PreTrainedTokenizerBase:
    """Train a small T5 tokenizer, offline; the SentencePiece model is written to ``model_file``.

    The ids of its special tokens are those of UMT5: 0 padding, 1 end, 2 unknown. Both files give the same ids for a text.
    """
    trained = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TOKENIZER_TEXT.splitlines() * 2),
        model_writer=trained,
        model_type="unigram",
        vocab_size=640,
        hard_vocab_limit=False,
        character_coverage=1.0,
        required_chars="".join(map(chr, range(33, 127))),
        normalization_rule_name="identity",
        num_threads=1,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        pad_piece="<pad>",
        minloglevel=2,
    )
    model_file.write_bytes(trained.getvalue())
    model = sentencepiece.SentencePieceProcessor(model_proto=trained.getvalue())
    pieces = [(model.id_to_piece(index), model.get_score(index)) for index in range(model.get_piece_size())]

    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)])
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in ("<pad>", "</s>", "<unk>")])
    return T5TokenizerFast(
        tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>", pad_token="<pad>", extra_ids=0, model_max_length=512
    )


def make_tokenizer_portable(folder: Path) -> None:
    """Describe the tokenizer of a saved pipeline as the published files do; transformers 4 cannot read what transformers 5 writes."""
    config = {
        "tokenizer_class": "T5TokenizerFast",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "extra_ids": 0,
        "model_max_length": 512,
    }
    (folder / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    index = folder / "model_index.json"
    index.write_text(index.read_text(encoding="utf-8").replace('"T5Tokenizer"', '"T5TokenizerFast"'), encoding="utf-8")


def randomize(module: torch.nn.Module, generator: torch.Generator, gain: float = 1.0) -> None:
    """Draw every parameter so that signals keep their size from layer to layer and no path through the model is dead.

    diffusers' own initial values are too small for this: over hundreds of padding tokens, two prompts would give nearly the same output.
    """
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
        if name.endswith("scale_shift_table"):
            value = 0.3 * noise
        elif name.endswith(("norm_q.weight", "norm_k.weight")):
            value = 1.5 + 0.2 * noise  # sharp attention, so that single tokens matter
        elif "norm" in name and name.endswith(("weight", "gamma")):
            value = 1.0 + 0.2 * noise
        elif parameter.ndim < 2 or name.endswith("bias"):
            value = 0.1 * noise
        else:
            value = noise * (gain / math.sqrt(parameter[0].numel()))
        parameter.data.copy_(value)


def make_expert(
    num_blocks: int, num_heads: int, dtype: torch.dtype, generator: torch.Generator, head_dim: int = HEAD_DIM
) -> WanTransformer3DModel:
    """One expert: the configuration of Wan 2.2 I2V 14B with smaller numbers."""
    expert = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=num_heads,
        attention_head_dim=head_dim,
        in_channels=36,
        out_channels=16,
        text_dim=TEXT_DIM,
        freq_dim=256,
        ffn_dim=2 * num_heads * head_dim,
        num_layers=num_blocks,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=1024,
    )
    randomize(expert, generator)
    return expert if dtype == torch.float32 else expert.to(dtype)


def make_vae(generator: torch.Generator, *, num_res_blocks: int = 1) -> AutoencoderKLWan:
    """The Wan 2.1 VAE with 8 instead of 96 channels: the same compression (8 x 8 x 4), latent channels, means and deviations.

    Args:
        generator: Of its weights.
        num_res_blocks: The published one has 2, which single files and ComfyUI take for granted.
    """
    vae = AutoencoderKLWan(base_dim=8, z_dim=16, num_res_blocks=num_res_blocks)
    randomize(vae, generator)
    # Latents and pixels of a usual size: the real ones deviate by about 2 and by about 0.5.
    vae.encoder.conv_out.weight.data.mul_(3.0)
    vae.decoder.conv_out.weight.data.mul_(0.7)
    return vae


def make_text_encoder(vocab_size: int, generator: torch.Generator, **sizes: int) -> UMT5EncoderModel:
    """UMT5's encoder with two narrow layers, or with other ``sizes``, by UMT5Config's names."""
    config = {
        "vocab_size": vocab_size,
        "d_model": TEXT_DIM,
        "d_kv": 8,
        "d_ff": 64,
        "num_layers": 2,
        "num_heads": 4,
        "feed_forward_proj": "gated-gelu",
        "tie_word_embeddings": False,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "decoder_start_token_id": 0,
    }
    encoder = UMT5EncoderModel(UMT5Config(**{**config, **sizes}))
    randomize(encoder, generator)
    # Rows of an embedding are looked up, not summed over: they need the size of a hidden state.
    encoder.shared.weight.data.normal_(generator=generator)
    return encoder


def make_tiny_checkpoint(
    folder: str | Path,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    num_blocks: int = 5,
    num_heads: int = 3,
    head_dim: int = HEAD_DIM,
    sharded: bool = False,
) -> Path:
    """Write the checkpoint and return its folder. The same arguments give the same weights.

    Args:
        folder: Where to write; an existing folder is replaced.
        seed: Of all weights.
        dtype: Of the experts and the text encoder. The VAE is float32, as published.
        num_blocks: Transformer blocks per expert.
        num_heads: Attention heads.
        head_dim: Channels of a head; Wan's have 128.
        sharded: Write each expert as several safetensors files with an index, as large models are.
    """
    folder = Path(folder)
    generator = torch.Generator().manual_seed(seed)
    with tempfile.TemporaryDirectory() as scratch:
        sentencepiece_file = Path(scratch, "spiece.model")
        tokenizer = make_tokenizer(sentencepiece_file)
        pipeline = WanImageToVideoPipeline(
            tokenizer=tokenizer,
            text_encoder=make_text_encoder(len(tokenizer), generator).to(dtype),
            vae=make_vae(generator),
            # flow_shift as in the published scheduler_config.json; Wan's own scripts and the sampler node use 5.
            scheduler=UniPCMultistepScheduler(
                prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, num_train_timesteps=1000
            ),
            transformer=make_expert(num_blocks, num_heads, dtype, generator, head_dim),
            transformer_2=make_expert(num_blocks, num_heads, dtype, generator, head_dim),
            boundary_ratio=0.9,
        )
        shutil.rmtree(folder, ignore_errors=True)
        pipeline.save_pretrained(folder)
        shutil.copy(sentencepiece_file, folder / "tokenizer" / "spiece.model")
    make_tokenizer_portable(folder)
    if sharded:
        for name in ("transformer", "transformer_2"):
            expert = getattr(pipeline, name)
            total_bytes = sum(parameter.numel() * parameter.element_size() for parameter in expert.parameters())
            shutil.rmtree(folder / name)
            expert.save_pretrained(folder / name, max_shard_size=total_bytes // 3)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--num-blocks", type=int, default=5)
    parser.add_argument("--num-heads", type=int, default=3)
    parser.add_argument("--sharded", action="store_true", help="write each expert as several files with an index")
    arguments = vars(parser.parse_args())
    folder = make_tiny_checkpoint(arguments.pop("folder"), dtype=DTYPES[arguments.pop("dtype")], **arguments)
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    print(f"{folder}: {size / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
