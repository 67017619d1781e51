"""Perplexity on text, by the protocol that papers on compression use."""
