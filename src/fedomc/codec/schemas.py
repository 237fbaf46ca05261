"""The schemas of the codec's operators, all of which write their results to arguments."""

SCHEMAS = {
    "absmax": "(Tensor values, Tensor(a!) out) -> ()",
    "decode": "(Tensor words, Tensor scale_offset, int e, int m, Tensor(a!) out) -> ()",
    "decode_sum": "(Tensor words, Tensor scale_offset, int e, int m, Tensor update_words, Tensor update_scale_offset, "
    "int update_e, int update_m, Tensor(a!) out) -> ()",
    "decode_add": "(Tensor words, Tensor scale_offset, int e, int m, float weight, Tensor(a!) out) -> ()",
    "decode_add_difference": "(Tensor words, Tensor scale_offset, int e, int m, Tensor subtrahend_words, "
    "Tensor subtrahend_scale_offset, int subtrahend_e, int subtrahend_m, float weight, Tensor(a!) out) -> ()",
    "add_difference": "(Tensor values, Tensor subtrahend, float weight, Tensor(a!) out) -> ()",
    "encode": "(Tensor values, int e, int m, int exponent, int? seed, int start, Tensor(a!) words, Tensor(b!) sums, "
    "Tensor(c!) status) -> ()",
    "choose_exponent": "(Tensor status, int e, int m, bool stochastic, Tensor(a!) exponent, "
    "Tensor(b!) scale_offset) -> ()",
    "encode_scaled": "(Tensor values, int e, int m, Tensor exponent, int? seed, int start, Tensor(a!) words, "
    "Tensor(b!) sums, Tensor(c!) status) -> ()",
    "keep": "(Tensor present, Tensor status, Tensor(a!) out) -> ()",
    "update": "(Tensor words, Tensor scale_offset, int e, int m, Tensor gradient, float alpha, bool rescale, "
    "int? seed, Tensor(a!) out, Tensor(b!) out_scale_offset, Tensor(c!) status) -> ()",
    "block_decode": "(Tensor words, Tensor scales, int kind, int e, int m, int block, Tensor(a!) out) -> ()",
    "block_decode_sum": "(Tensor words, Tensor scales, int kind, int e, int m, int block, Tensor update_words, "
    "Tensor update_scales, int update_kind, int update_e, int update_m, int update_block, Tensor(a!) out) -> ()",
    "block_encode": "(Tensor values, int kind, int e, int m, int block, int? seed, int start, Tensor(a!) words, "
    "Tensor(b!) scales, Tensor(c!) status) -> ()",
    "block_update": "(Tensor words, Tensor scales, int kind, int e, int m, int block, Tensor gradient, float alpha, "
    "int? seed, Tensor(a!) out, Tensor(b!) out_scales, Tensor(c!) status) -> ()",
    "rotated_decode": "(Tensor words, Tensor scales, int bits, int seed, int start, Tensor(a!) out) -> ()",
    "rotated_encode": "(Tensor values, int bits, int seed, int start, bool unbiased, Tensor(a!) words, "
    "Tensor(b!) scales) -> ()",
}
