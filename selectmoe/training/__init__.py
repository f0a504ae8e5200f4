"""What the two training stages, gate warm-up and finetuning, share."""
