"""From scores to `selected_data.jsonl`: exact top-k selection in constant memory."""
