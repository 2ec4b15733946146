"""Models on disk, and to and from what other tools have: masks, sparse matrices, ONNX, the Hub."""
