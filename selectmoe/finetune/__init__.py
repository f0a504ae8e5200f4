"""Stage 3: LoRA finetuning on the selected conversations."""
