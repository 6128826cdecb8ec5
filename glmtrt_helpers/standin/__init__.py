"""The stand-in checkpoint: corpus, remote-code template and trainer. Nothing else in the project imports this."""
