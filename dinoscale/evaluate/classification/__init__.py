"""What a class token is worth: nearest neighbours, linear probes, fine-tuning."""
