"""Raw text to packed token ids: corpus, tokenizer, encoded shards, sample order."""
