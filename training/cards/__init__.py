"""Model cards with figures: records of training and measurements, as Markdown and metadata."""
