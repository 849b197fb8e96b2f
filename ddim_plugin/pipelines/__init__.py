"""The pipeline that samples, encodes, decodes and interpolates."""
