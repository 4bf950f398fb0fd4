"""The int8 product and the row quantizer by device: `dispatch` chooses, `reference` is the contract."""
