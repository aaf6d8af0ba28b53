"""Text -> vectors: templates, what is written of items, the sentence encoder, intents."""
