"""Which expert a file's name says it is, and which other file goes with it."""

import pytest
from wan_sharded.engine.checkpoints.pairing import check_slot, noise_level, partner, surely_for
from wan_sharded.engine.checkpoints.stored import HIGH_NOISE, LOW_NOISE
from wan_sharded.engine.errors import CheckpointError

# As published, each with its partner.
PAIRS = [
    ("wan2.2_i2v_high_noise_14B_fp8_scaled.safetensors", "wan2.2_i2v_low_noise_14B_fp8_scaled.safetensors"),
    ("wan2.2_i2v_lightx2v_4steps_lora_v1_high_noise.safetensors", "wan2.2_i2v_lightx2v_4steps_lora_v1_low_noise.safetensors"),
    ("Wan2.2-I2V-A14B-HighNoise-Q4_K_M.gguf", "Wan2.2-I2V-A14B-LowNoise-Q4_K_M.gguf"),
    ("Wan2_2-I2V-A14B-HIGH_fp8_e4m3fn_scaled_KJ.safetensors", "Wan2_2-I2V-A14B-LOW_fp8_e4m3fn_scaled_KJ.safetensors"),
    ("smoothMix_i2vV20High.safetensors", "smoothMix_i2vV20Low.safetensors"),
    ("remixI2VHigh_v3.safetensors", "remixI2VLow_v3.safetensors"),
    ("wan-high-q8.gguf", "wan-low-q8.gguf"),
    ("wan22 highnoise.gguf", "wan22 lownoise.gguf"),
    ("wan22_H_noise.gguf", "wan22_L_noise.gguf"),
    ("HighNoise/Wan2.2-I2V-A14B-HighNoise-Q8_0.gguf", "LowNoise/Wan2.2-I2V-A14B-LowNoise-Q8_0.gguf"),
    ("Wan\\HighNoise\\expert-HighNoise.gguf", "Wan\\LowNoise\\expert-LowNoise.gguf"),
    ("wan/high_noise_model/model.safetensors", "wan/low_noise_model/model.safetensors"),
    ("slow_highres_high_noise.safetensors", "slow_highres_low_noise.safetensors"),
    ("low_vram_high_noise.safetensors", "low_vram_low_noise.safetensors"),
    ("Wan22_HIGHnoise_q8.gguf", "Wan22_LOWnoise_q8.gguf"),
    ("Wan22-I2VHIGH.gguf", "Wan22-I2VLOW.gguf"),
]


@pytest.mark.parametrize(("high", "low"), PAIRS)
def test_pairs(high: str, low: str) -> None:
    assert (noise_level(high), noise_level(low)) == ("high", "low")
    others = [name for pair in PAIRS for name in pair]
    assert partner(high, others) == low
    assert partner(low, others) == high


@pytest.mark.parametrize(
    "name",
    [
        "wan2.1_i2v_480p_14B_fp16.safetensors",
        "slow.safetensors",
        "flow_match.safetensors",
        "below.gguf",
        "highres.safetensors",
        "HighRes.safetensors",
        "high_resolution.safetensors",
        "LOWres.safetensors",
        "low_vram.safetensors",
        "high-quality.safetensors",
        "fast_high_speed.gguf",
        "highway/wan.gguf",
        "h.safetensors",
        "noise.safetensors",
        "high_low_merged.safetensors",
        "HighNoise_LowNoise.safetensors",
        "",
        "/",
    ],
)
def test_names_that_say_nothing(name: str) -> None:
    assert noise_level(name) is None
    assert partner(name, [name, "wan_low.gguf", "wan_high.gguf"]) is None


def test_noise_counts_more_than_the_word_alone() -> None:
    assert noise_level("wan_low_noise_high_strength.safetensors") == "low"
    assert noise_level("HighNoise/low.gguf") == "low", "the file more than its folder"
    assert noise_level("low/sub/wan.gguf") == "low"


def test_the_exact_name_is_preferred() -> None:
    choices = ["wan_LOW.gguf", "wan_low.gguf", "wan_Low.gguf"]
    assert partner("wan_High.gguf", choices) == "wan_Low.gguf"
    assert partner("wan_HIGH.gguf", choices) == "wan_LOW.gguf"


def test_slashes_of_either_kind() -> None:
    assert partner("high/wan_high.gguf", ["low\\wan_low.gguf"]) == "low\\wan_low.gguf"


def test_both_in_one_folder_or_in_folders_of_their_own() -> None:
    assert partner("high and low/wan_high.gguf", ["high and low/wan_low.gguf"]) == "high and low/wan_low.gguf"
    assert partner("HighNoise/wan_high.gguf", ["HighNoise/wan_low.gguf"]) == "HighNoise/wan_low.gguf"
    assert partner("HighNoise/wan.gguf", ["other/wan.gguf", "LowNoise/wan.gguf"]) == "LowNoise/wan.gguf"
    assert partner("a/wan_high.gguf", ["b/wan_low.gguf"]) == "b/wan_low.gguf"


def test_another_spelling_of_the_level() -> None:
    assert partner("wan_HIGH_v2.gguf", ["wan_Low_v1.gguf", "wan_Low_v2.gguf", "wan_high_v2.gguf"]) == "wan_Low_v2.gguf"


def test_no_guess() -> None:
    assert partner("wan_high_q4.gguf", ["wan_low_q8.gguf"]) is None
    assert partner("wan_HIGH.gguf", ["a/wan_Low.gguf", "b/wan_low.gguf"]) is None, "two would do"
    assert partner("wan_high.gguf", []) is None
    assert partner("wan_high.gguf", ["wan_high.gguf"]) is None


@pytest.mark.parametrize(
    ("name", "wanted", "other"),
    [
        ("wan2.2_i2v_low_noise_14B.safetensors", HIGH_NOISE, "low_noise_model"),
        ("Wan2.2-I2V-A14B-HighNoise.gguf", LOW_NOISE, "high_noise_model"),
    ],
)
def test_the_wrong_slot(name: str, wanted: str, other: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        check_slot(name, wanted)
    message = str(caught.value)
    assert name in message and other in message
    assert "high noise expert" in message and "low noise expert" in message


def test_slots_that_fit() -> None:
    check_slot("wan_high.gguf", HIGH_NOISE)
    check_slot("wan_low.gguf", LOW_NOISE)
    check_slot("merged.gguf", HIGH_NOISE)
    check_slot("merged.gguf", LOW_NOISE)


def test_what_a_name_surely_says() -> None:
    """A LoRA's name may be of what it shows."""
    assert surely_for("high_heels.safetensors", ["high_heels.safetensors", "low_sun.safetensors"]) is None
    assert surely_for("high_heels.safetensors", ["low_heels.safetensors"]) == "high"
    assert surely_for("style_HIGH_v2.safetensors", ["sub/style_LOW_v2.safetensors"]) == "high"
    assert surely_for("style_low_noise.safetensors", []) == "low"
    assert surely_for("HighNoise/style.safetensors", []) == "high"
    assert surely_for("style.safetensors", []) is None
    assert surely_for("low_noise/high_heels.safetensors", []) == "low"
    assert surely_for("low_noise/high_noise/low_light.safetensors", []) == "high"
    assert surely_for("high_noise_low_noise.safetensors", []) is None
    assert surely_for("low_lighting.safetensors", ["high_contrast.safetensors"]) is None
    assert partner("a_high_lighting.safetensors", ["a_low_lighting.safetensors"]) == "a_low_lighting.safetensors", "Lightning, misspelled"
