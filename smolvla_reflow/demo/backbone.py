"""A SmolVLM small enough for a laptop CPU, built from a config and saved to a local folder.

The folder serves as SmolVLA's `vlm_model_name`. It has everything that LeRobot needs (configuration, tokenizer, image
processor), so that the demo and the tests run the real SmolVLA code offline. Weights are random: use
`load_vlm_weights=false`.
"""

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    PreTrainedTokenizerFast,
    SmolVLMConfig,
    SmolVLMImageProcessor,
    SmolVLMProcessor,
    SmolVLMVideoProcessor,
)

# SmolVLA asks the tokenizer for these by attribute name (`fake_image_token_id`, ...).
SPECIAL_TOKENS = {
    "fake_image_token": "<fake_token_around_image>",
    "image_token": "<image>",
    "global_image_token": "<global-img>",
    "end_of_utterance_token": "<end_of_utterance>",
}


def write_backbone(
    folder: Path,
    *,
    hidden_size: int = 64,
    num_layers: int = 2,
    num_attention_heads: int = 4,
    num_key_value_heads: int = 2,
    image_size: int = 32,
    patch_size: int = 8,
    vision_hidden_size: int = 64,
    vision_num_layers: int = 2,
    vision_num_attention_heads: int = 4,
) -> Path:
    """Write a loadable SmolVLM folder and return it. Sizes without a prefix are the language model's.

    An image of `image_size` pixels becomes `(image_size / patch_size)^2` patches; 2 x 2 patches become one token.
    """
    tokenizer = _byte_level_tokenizer()
    config = SmolVLMConfig(
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        pad_token_id=tokenizer.pad_token_id,
        scale_factor=2,
        text_config={
            "model_type": "llama",
            "vocab_size": len(tokenizer),
            "hidden_size": hidden_size,
            "intermediate_size": 4 * hidden_size,
            "num_hidden_layers": num_layers,
            "num_attention_heads": num_attention_heads,
            "num_key_value_heads": num_key_value_heads,
            "head_dim": hidden_size // num_attention_heads,
            "pad_token_id": tokenizer.pad_token_id,
            "initializer_range": hidden_size**-0.5,
        },
        vision_config={
            "hidden_size": vision_hidden_size,
            "intermediate_size": 4 * vision_hidden_size,
            "num_hidden_layers": vision_num_layers,
            "num_attention_heads": vision_num_attention_heads,
            "image_size": image_size,
            "patch_size": patch_size,
            "initializer_range": vision_hidden_size**-0.5,
        },
    )
    edge = {"longest_edge": image_size}
    processor = SmolVLMProcessor(
        image_processor=SmolVLMImageProcessor(size=edge, max_image_size=edge),
        tokenizer=tokenizer,
        video_processor=SmolVLMVideoProcessor(size=edge, max_image_size=edge),
        image_seq_len=(image_size // patch_size // 2) ** 2,
        chat_template="{% for message in messages %}{{ message['content'] }}{% endfor %}",
    )
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def _byte_level_tokenizer() -> PreTrainedTokenizerFast:
    """A BPE without merges: one token per byte, so any instruction can be read."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<pad>",
        padding_side="right",
        extra_special_tokens=SPECIAL_TOKENS,
    )
