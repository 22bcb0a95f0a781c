"""Classification with class tokens: nearest neighbours, linear probes, fine-tuning."""
