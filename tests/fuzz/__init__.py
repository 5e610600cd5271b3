"""What strangers send, byte by byte: fuzz targets, and the inputs that they have been through."""
