"""The GPU kernels in Triton, for Ampere and newer: one adapter, many clients, projections that share x; launch.py
launches them.

    forward   _down_kernel   h = x A^T, in parts over K
              _gemm_kernel   y = x W^T + s h B^T + b, the low-rank product in the accumulator of the main one
    backward  _dy_kernel     one pass over dy: dh = s dy B in parts over N, dB = s dy^T h in parts over M
              _gemm_kernel   dx = dy W + dh A
              _dA_kernel     dA = dh^T x in parts over M
              _sum_kernel    dA and dB from their parts

Products accumulate in float32. Parts are summed in order and nothing depends on which program ends first, so results
repeat bit for bit. Where a tile holds rows of several clients masks part them: no row is padded, and no number of
launches depends on C. Sizes as in `reference`; ranks round up to a power of two >= 16, the least that tl.dot takes.
"""

import triton
import triton.language as tl


@triton.jit
def _client_of(row, offsets, C):
    """The client who has this row: the first one whose rows end after it."""
    low = 0
    high = C - 1
    while low < high:
        middle = (low + high) // 2
        after = tl.load(offsets + middle + 1) > row
        high = tl.where(after, middle, high)
        low = tl.where(after, low, middle + 1)
    return low


@triton.jit
def _clients_of(start, stop, offsets, C):
    """First and last client with rows in [start, stop); without offsets there is one, who has them all."""
    if offsets is None:
        return 0, 0
    else:
        return _client_of(start, offsets, C), _client_of(stop - 1, offsets, C)


@triton.jit
def _rows_of(c, start, stop, offsets):
    """The rows of client c within [start, stop)."""
    if offsets is None:
        return start, stop
    else:
        return tl.maximum(start, tl.load(offsets + c)), tl.minimum(stop, tl.load(offsets + c + 1))


@triton.jit
def _rank_of(c, ranks, R: tl.constexpr):
    if ranks is None:
        return R
    else:
        return tl.minimum(tl.load(ranks + c), R)


@triton.jit
def _sum_parts(parts, S: tl.constexpr, M, m, r, mask, stride):
    """Rows m and columns r of the sum over s of parts[s] (M,stride), float32."""
    at = m[:, None] * stride + r[None, :]
    total = tl.load(parts + at, mask=mask, other=0.0)
    for _ in tl.static_range(1, S):
        parts += M.to(tl.int64) * stride
        total += tl.load(parts + at, mask=mask, other=0.0)
    return total


@triton.jit(do_not_specialize=["M", "C", "steps"])
def _down_kernel(
    x, lora_A, parts, offsets, scalings, ranks, scale, M, K, C, steps, stride_x, stride_c, stride_r, stride_k,
    R: tl.constexpr, RP: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """parts[i] (M,R) = s x A^T over the i-th `steps` times BK columns of x (M,K) and A (R,K) or (C,R,K).

    Zero beyond a client's rank. EVEN: K is a multiple of BK.
    """
    start = tl.program_id(0) * BM
    stop = tl.minimum(start + BM, M)
    left = tl.program_id(1) * steps * BK
    right = tl.minimum(left + steps * BK, K)
    m, k, r = tl.arange(0, BM), tl.arange(0, BK), tl.arange(0, RP)
    x_at = m[:, None] * stride_x + k[None, :]
    A_at = r[None, :] * stride_r + k[:, None] * stride_k
    h_at = m[:, None] * R + r[None, :]
    x += start.to(tl.int64) * stride_x + left
    lora_A += left.to(tl.int64) * stride_k
    parts += (tl.program_id(1) * M.to(tl.int64) + start) * R
    first, last = _clients_of(start, stop, offsets, C)
    for c in range(first, last + 1):
        begin, end = _rows_of(c, start, stop, offsets)
        rank = _rank_of(c, ranks, R)
        mine = (start + m >= begin) & (start + m < end)
        known = r < rank
        x_tiles, A_tiles = x, lora_A
        if offsets is not None:
            A_tiles += tl.cast(c, tl.int64) * stride_c
        h = tl.zeros((BM, RP), tl.float32)
        for at in range(left, right, BK):
            if EVEN:
                x_tile = tl.load(x_tiles + x_at, mask=mine[:, None], other=0.0)
                A_tile = tl.load(A_tiles + A_at, mask=known[None, :], other=0.0)
            else:
                inside = at + k < right
                x_tile = tl.load(x_tiles + x_at, mask=mine[:, None] & inside[None, :], other=0.0)
                A_tile = tl.load(A_tiles + A_at, mask=known[None, :] & inside[:, None], other=0.0)
            h = tl.dot(x_tile, A_tile.to(x_tile.dtype), h, input_precision="ieee")
            x_tiles += BK
            A_tiles += BK * stride_k
        s = scale if scalings is None else tl.load(scalings + c)
        tl.store(parts + h_at, h * s, mask=mine[:, None] & (r < R)[None, :])


@triton.jit
def _tile_of(M, N, BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr):
    """This program's tile of (M,N), in bands of GROUP row tiles, so that neighbours share rows and columns in L2."""
    program = tl.program_id(0)
    tiles_m, tiles_n = tl.cdiv(M, BM), tl.cdiv(N, BN)
    band = program // (GROUP * tiles_n)
    height = tl.minimum(tiles_m - band * GROUP, GROUP)
    within = program % (GROUP * tiles_n)
    return band * GROUP + within % height, within // height


@triton.jit
def _factor(factor, scaling, r, n, rank, in_n, stride_r, stride_n, dtype: tl.constexpr):
    """Components r and columns n of s B^T (R,N), scaled in float32 and rounded once to the dtype of the product."""
    at = r[:, None] * stride_r + n[None, :] * stride_n
    tile = tl.load(factor + at, mask=(r < rank)[:, None] & in_n[None, :], other=0.0)
    return (tile.to(tl.float32) * scaling).to(dtype)


@triton.jit
def _isolated(h, factor, mine):
    """For a tile of several clients: NaN or inf in one's factor must reach its rows only, and 0 * NaN is NaN. So such
    entries become 0 in the factor, and the client's own rows of h NaN."""
    finite = tl.abs(factor.to(tl.float32)) < float("inf")
    lost = tl.sum(tl.where(finite, 0, 1)) > 0
    return tl.where(mine[:, None] & lost, float("nan"), h).to(h.dtype), tl.where(finite, factor, 0.0).to(factor.dtype)


@triton.jit
def _product(
    acc, wide, rows, weight, lora_A, D, in_m, in_n, m, n, r, stride_rows, stride_d, stride_n, R: tl.constexpr,
    BK: tl.constexpr, EVEN: tl.constexpr, ON_THE_FLY: tl.constexpr,
):  # fmt: skip
    """acc + rows (BM,D) weight (D,BN) and, with ON_THE_FLY, wide + rows lora_A^T, lora_A (R,D)."""
    d = tl.arange(0, BK)
    rows_at = m[:, None] * stride_rows + d[None, :]
    weight_at = d[:, None] * stride_d + n[None, :] * stride_n
    for at in range(0, D, BK):
        if EVEN:
            rows_tile = tl.load(rows + rows_at, mask=in_m[:, None], other=0.0)
            weight_tile = tl.load(weight + weight_at, mask=in_n[None, :], other=0.0)
        else:
            inside = at + d < D
            rows_tile = tl.load(rows + rows_at, mask=in_m[:, None] & inside[None, :], other=0.0)
            weight_tile = tl.load(weight + weight_at, mask=in_n[None, :] & inside[:, None], other=0.0)
        acc = tl.dot(rows_tile, weight_tile.to(rows_tile.dtype), acc, input_precision="ieee")
        if ON_THE_FLY:
            A_at = r[None, :] * D + d[:, None]
            A_tile = tl.load(lora_A + A_at, mask=(r < R)[None, :] & (at + d < D)[:, None], other=0.0)
            wide = tl.dot(rows_tile, A_tile.to(rows_tile.dtype), wide, input_precision="ieee")
            lora_A += BK
        rows += BK
        weight += BK * stride_d
    return acc, wide


@triton.jit(do_not_specialize=["M", "C", "components"])
def _gemm_kernel(
    out, low, rows, weights, downs, factors, bias, offsets, scalings, ranks, scale, M, N, C, components,
    D, stride_rows, stride_wd, stride_wn, stride_down, stride_fc, stride_fr, stride_fn, stride_low, stride_bias,
    P: tl.constexpr, S: tl.constexpr, R: tl.constexpr, RS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    EVEN: tl.constexpr, EARLY: tl.constexpr, ON_THE_FLY: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """out (M,N) = sum over p < P of rows[p] weights[p] + s low[p] factors[p], + bias; tuples have an entry for each p.

    rows[p] (M,D[p]), weights[p] (D[p],N), factors[p] (R[p],N) or (C,R,N), bias (N,) or (C,N) or None.
    downs[p] (S[p],M,stride_down[p]) holds low[p] in parts; with ON_THE_FLY it is lora_A (R,D), and low = rows lora_A^T.
    low (M, sum of R) or None: where the first column of programs leaves low[p] for later, side by side.
    EARLY, for one adapter: loads of the low-rank step are issued before the long loop, which hides their wait. Else it
    takes RS of the `components` at a time, at most R, so that registers do not grow with the rank.
    """
    dtype: tl.constexpr = out.dtype.element_ty
    tile_m, tile_n = _tile_of(M, N, BM, BN, GROUP)
    start, left = tile_m * BM, tile_n * BN
    stop = tl.minimum(start + BM, M)
    m, n, r = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, RS)
    in_m, in_n = start + m < M, left + n < N
    row, column = start.to(tl.int64), left.to(tl.int64)
    if low is not None:
        low += row * stride_low
    acc = tl.zeros((BM, BN), tl.float32)
    for p in tl.static_range(P):
        factor = factors[p] + column * stride_fn[p]
        down = downs[p] if ON_THE_FLY else downs[p] + row * stride_down[p]
        if EARLY:
            factor_tile = _factor(factor, scale[p], r, n, R[p], in_n, stride_fr[p], stride_fn[p], dtype)
            if not ON_THE_FLY:
                known = in_m[:, None] & (r < R[p])[None, :]
                h = _sum_parts(down, S[p], M, m, r, known, stride_down[p]).to(dtype)
        acc, wide = _product(
            acc, tl.zeros((BM, RS), tl.float32), rows[p] + row * stride_rows[p], weights[p] + column * stride_wn[p],
            down, D[p], in_m, in_n, m, n, r, stride_rows[p], stride_wd[p], stride_wn[p], R[p], BK, EVEN, ON_THE_FLY,
        )  # fmt: skip
        if EARLY:
            if ON_THE_FLY:
                h = wide.to(dtype)
            acc = tl.dot(h, factor_tile, acc, input_precision="ieee")
            if low is not None and tile_n == 0:
                tl.store(low + m[:, None] * stride_low + r[None, :], h, mask=in_m[:, None] & (r < R[p])[None, :])
        else:
            first, last = _clients_of(start, stop, offsets, C)
            for c in range(first, last + 1):
                begin, end = _rows_of(c, start, stop, offsets)
                mine = (start + m >= begin) & (start + m < end)
                rank = _rank_of(c, ranks, R[p])
                s = scale[p] if scalings is None else tl.load(scalings + c)
                own = factor + tl.cast(c, tl.int64) * stride_fc[p]
                for at in tl.range(0, components, RS, num_stages=1):
                    known = mine[:, None] & (at + r < rank)[None, :]
                    h = _sum_parts(down + at, S[p], M, m, r, known, stride_down[p]).to(dtype)
                    if low is not None and tile_n == 0:
                        low_at = low + at + m[:, None] * stride_low + r[None, :]
                        tl.store(low_at, h, mask=mine[:, None] & (at + r < R[p])[None, :])
                    factor_tile = _factor(own, s, at + r, n, rank, in_n, stride_fr[p], stride_fn[p], dtype)
                    if first != last:
                        h, factor_tile = _isolated(h, factor_tile, mine)
                    acc = tl.dot(h, factor_tile, acc, input_precision="ieee")
                if bias is not None and stride_bias != 0:
                    own_bias = bias + tl.cast(c, tl.int64) * stride_bias + column + n
                    own_bias = tl.load(own_bias, mask=in_n, other=0.0).to(tl.float32)
                    acc += tl.where(mine[:, None], own_bias[None, :], 0.0)
        if low is not None:
            low += R[p]
    if bias is not None and stride_bias == 0:
        acc += tl.load(bias + column + n, mask=in_n, other=0.0).to(tl.float32)[None, :]
    out += row * N + column
    tl.store(out + m[:, None] * N + n[None, :], acc.to(dtype), mask=in_m[:, None] & in_n[None, :])


@triton.jit(do_not_specialize=["M", "C", "chunk"])
def _dy_kernel(
    dy, h, lora_B, dh_parts, dB_pieces, db_pieces, offsets, scalings, ranks, scale, M, N, C, chunk,
    stride_dy, stride_h, stride_c, stride_n, stride_r, stride_piece,
    R: tl.constexpr, RP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Over BN columns and `chunk` rows of dy (M,N): dh = s dy B, dB = s dy^T h and db = the sum of rows, in parts.

    dh_parts (N / BN, M, R), dB_pieces (pieces, N, R) and db_pieces (pieces, N) float32; None is not computed.
    Chunk t of client c is piece t + c. Down the rows either one grows, so no two share a piece, and chunks + C - 1
    pieces are enough however the rows are cut.
    """
    start = tl.program_id(1) * chunk
    stop = tl.minimum(start + chunk, M)
    left = tl.program_id(0) * BN
    m, n, r = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, RP)
    in_n, in_r = left + n < N, r < R
    left = left.to(tl.int64)
    first, last = _clients_of(start, stop, offsets, C)
    for c in range(first, last + 1):
        begin, end = _rows_of(c, start, stop, offsets)
        known = r < _rank_of(c, ranks, R)
        s = scale if scalings is None else tl.load(scalings + c)
        piece = (tl.program_id(1) + c).to(tl.int64) * stride_piece
        if dh_parts is not None:
            B_own = lora_B + left * stride_n + tl.cast(c, tl.int64) * stride_c
            B_at = n[:, None] * stride_n + r[None, :] * stride_r
            B_tile = tl.load(B_own + B_at, mask=in_n[:, None] & known[None, :], other=0.0).to(dy.dtype.element_ty)
        dB = tl.zeros((RP, BN), tl.float32)
        db = tl.zeros((BN,), tl.float32)
        for row in range(begin, end, BM):
            in_m = row + m < end
            at = tl.cast(row, tl.int64)
            dy_at = m[:, None] * stride_dy + n[None, :]
            dy_tile = tl.load(dy + at * stride_dy + left + dy_at, mask=in_m[:, None] & in_n[None, :], other=0.0)
            if dB_pieces is not None:
                h_at = m[:, None] * stride_h + r[None, :]
                h_tile = tl.load(h + at * stride_h + h_at, mask=in_m[:, None] & known[None, :], other=0.0)
                dB = tl.dot(tl.trans(h_tile), dy_tile, dB, input_precision="ieee")
            if db_pieces is not None:
                db += tl.sum(dy_tile.to(tl.float32), 0)
            if dh_parts is not None:
                dh = tl.dot(dy_tile, B_tile, input_precision="ieee") * s
                dh_own = dh_parts + (tl.program_id(0) * M.to(tl.int64) + at) * R
                tl.store(dh_own + m[:, None] * R + r[None, :], dh, mask=in_m[:, None] & in_r[None, :])
        if dB_pieces is not None:
            dB_at = r[:, None] + n[None, :] * R
            tl.store(dB_pieces + piece + left * R + dB_at, dB * s, mask=in_r[:, None] & in_n[None, :])
        if db_pieces is not None:
            tl.store(db_pieces + piece + left + n, db, mask=in_n)


@triton.jit(do_not_specialize=["M", "C", "chunk"])
def _dA_kernel(
    x, dh, dA_pieces, offsets, M, K, C, chunk, stride_x, stride_piece,
    R: tl.constexpr, RP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Over BN columns and `chunk` rows of x (M,K): dA = dh^T x, as piece t + c of dA_pieces (pieces, R, K).

    dh (M,R) is zero beyond a client's rank, and so is dA.
    """
    start = tl.program_id(1) * chunk
    stop = tl.minimum(start + chunk, M)
    left = tl.program_id(0) * BN
    m, k, r = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, RP)
    in_k, in_r = left + k < K, r < R
    first, last = _clients_of(start, stop, offsets, C)
    for c in range(first, last + 1):
        begin, end = _rows_of(c, start, stop, offsets)
        dA = tl.zeros((RP, BN), tl.float32)
        for row in range(begin, end, BM):
            in_m = row + m < end
            at = tl.cast(row, tl.int64)
            x_at = m[:, None] * stride_x + k[None, :]
            x_tile = tl.load(x + at * stride_x + left + x_at, mask=in_m[:, None] & in_k[None, :], other=0.0)
            dh_at = m[None, :] * R + r[:, None]
            dh_tile = tl.load(dh + at * R + dh_at, mask=in_m[None, :] & in_r[:, None], other=0.0)
            dA = tl.dot(dh_tile, x_tile, dA, input_precision="ieee")
        piece = (tl.program_id(1) + c).to(tl.int64) * stride_piece
        tl.store(dA_pieces + piece + left + r[:, None] * K + k[None, :], dA, mask=in_r[:, None] & in_k[None, :])


@triton.jit(do_not_specialize=["M", "C", "chunk"])
def _sum_kernel(pieces, sums, offsets, M, C, chunk, size_A, size_B, size_b, BLOCK: tl.constexpr):
    """Each client's sum over its chunks t of piece t + c, zero for one without rows.

    pieces  (chunks + C - 1, size_A + size_B + size_b) float32
    sums    (C, size_A), (C, size_B) and (C, size_b) one after another, float32
    """
    c = tl.program_id(0)
    begin, end = _rows_of(c, 0, M, offsets)
    size = size_A + size_B + size_b
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for t in range(begin // chunk, tl.cdiv(end, chunk) * (end > begin)):
        total += tl.load(pieces + (t + c).to(tl.int64) * size + at, mask=at < size, other=0.0)
    c = tl.cast(c, tl.int64)
    to = c * size_A + at
    to = tl.where(at >= size_A, C * size_A + c * size_B + at - size_A, to)
    to = tl.where(at >= size_A + size_B, C * (size_A + size_B) + c * size_b + at - size_A - size_B, to)
    tl.store(sums + to, total, mask=at < size)
