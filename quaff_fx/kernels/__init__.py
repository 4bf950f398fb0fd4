"""The int8 products and row quantizers, by device; `product` chooses."""
