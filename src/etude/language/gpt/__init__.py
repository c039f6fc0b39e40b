"""GPT: the network, published weights, and the training loop."""

from etude.language.gpt.network import GPT, Architecture, next_token_loss, total_nats
from etude.language.gpt.published import load_pretrained

__all__ = ["GPT", "Architecture", "load_pretrained", "next_token_loss", "total_nats"]
