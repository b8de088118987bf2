"""What others wrote about a fine-tuned model, made into adapter folders."""
