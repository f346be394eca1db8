"""Text to ids and back, by tokenizers that are borrowed: Hugging Face's or SentencePiece's.

OpenELM was trained on Llama 2's tokenizer, of which Apple ships no copy. A prompt begins with the
token <s> (`bos_token_id` of config.json), which is put there once, whatever the file says of it.
"""

from ..text.files import FILES, find_tokenizer, special_tokens
from ..text.tokenizer import TextStream, Tokenizer

__all__ = ["FILES", "TextStream", "Tokenizer", "find_tokenizer", "special_tokens"]
