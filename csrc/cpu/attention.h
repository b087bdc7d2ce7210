#pragma once

#include <cstdint>

namespace federa {

// Head h of token m at data + m * token + h * head: `dim` entries in a row.
template <class T>
struct Heads {
    T* data;
    std::int64_t token, head;

    T* at(std::int64_t m, std::int64_t h) const { return data + m * token + h * head; }
    Heads from(std::int64_t m, std::int64_t h) const { return {at(m, h), token, head}; }
};

// Attention within each of `examples` stretches of tokens: example e has the keys and values keys[e] to keys[e + 1] and
// the queries queries[e] to queries[e + 1].
struct AttentionShape {
    const std::int64_t *keys, *queries;
    std::int64_t examples, heads, dim;
    float scale;
};

// Whether the kernels below run here (AMX) and take heads of this size.
bool attention_available(std::int64_t dim);

// Both are there for float32 (T: float) and bfloat16 (T: std::uint16_t). In float32 all products are as exact as
// float32: three bfloat16s an entry, six products (lora_linear.h).

// out = softmax(scale q k^T) v. The backward is given of each query log2(e) times the largest scaled score and one over
// the sum of exponentials: softmax (2, heads, queries).
template <class T>
void attention_forward(const AttentionShape& shape, Heads<const T> q, Heads<const T> k, Heads<const T> v, Heads<T> out,
                       float* softmax, int threads);

// dq, dk and dv by d_out, recomputing the scores.
template <class T>
void attention_backward(const AttentionShape& shape, Heads<const T> q, Heads<const T> k, Heads<const T> v,
                        Heads<const T> out, const float* softmax, Heads<const T> d_out, Heads<T> dq, Heads<T> dk,
                        Heads<T> dv, int threads);

}  // namespace federa
