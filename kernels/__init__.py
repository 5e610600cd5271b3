"""What turns plans into tensors and back: device code. Knows no sequence, no proto, no configuration."""
