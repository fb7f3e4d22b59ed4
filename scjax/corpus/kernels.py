"""The hot passes of a build, compiled: are these counts, whose gene is this, gather, hash."""

from __future__ import annotations

import numba
import numpy as np

from scjax.corpus.compiled import compiled, mix, pointer


@compiled
def all_counts(values: np.ndarray, beyond: float, fractions: bool) -> bool:
    """Whether every value is at least 0, below ``beyond`` and, unless ``fractions``, whole. NaN is not."""
    good = True
    for k in range(values.size):
        value = values[k]
        good &= (value >= 0) & (value < beyond)
        if not fractions:
            good &= np.floor(value) == value
    return good


@compiled
def relabel(
    indptr,
    indices,
    data,
    ids,
    ordered,
    beyond,
    fractions,
    genes,
    counts,
    nnz,
    total,
    largest,
    whole,
    dense,
    seen,
):
    """Columns of a study -> genes of the vocabulary, rising within each row, one entry a gene.

    Args:
      indptr, indices, data: rows of a CSR matrix of counts that were checked.
      ids: int32, the gene of each column, -1 for none.
      ordered: the ids rise from column to column, those of -1 left out, and so do the columns in a row.
      beyond: sums of columns that are one gene must stay below this.
      fractions: whether counts may be other than whole numbers.
      genes, counts: filled from the front; as long as ``data``.
      nnz, total, largest, whole: per row: entries written, the sum over all columns, the largest count
        written, whether all of them are whole numbers.
      dense, seen: scratch: float64 [n_genes] and uint64 [n_genes / 64 + 1], zero on entry and on return.

    Returns:
      The first row in which a sum is too large, -1 if all is well.
    """
    one = np.uint64(1)
    at = 0
    for row in range(nnz.size):
        low, high = indptr[row], indptr[row + 1]
        # four sums, because each addition waits for the one before it
        a, b, c, d = 0.0, 0.0, 0.0, 0.0
        k = low
        while k + 4 <= high:
            a, b, c, d = a + data[k], b + data[k + 1], c + data[k + 2], d + data[k + 3]
            k += 4
        while k < high:
            a += data[k]
            k += 1
        sum_ = (a + b) + (c + d)
        # As a rule every column is a gene, in the vocabulary's order, and no count is 0: copies that need not
        # look at one element to know where the next goes.
        n, last, plain = at + high - low, np.int32(-1), True
        row_genes, row_counts = genes[at:n], counts[at:n]
        row_columns, row_data = indices[low:high], data[low:high]
        for k in range(row_columns.size):
            gene = ids[np.uint32(row_columns[k])]
            row_genes[k] = gene
            plain &= (gene > last) & (row_data[k] > 0)
            last = gene
        for k in range(row_data.size):
            row_counts[k] = row_data[k]
        if not plain and ordered:
            n = at
            for k in range(low, high):
                # a slot is written whether or not its gene is wanted, and kept if so
                gene = ids[np.uint32(indices[k])]
                genes[n] = gene
                counts[n] = data[k]
                n += (gene >= 0) & (data[k] > 0)
        elif not plain:  # through a table of all genes
            n = at
            for k in range(low, high):
                gene = ids[indices[k]]
                if gene >= 0 and data[k] > 0:
                    dense[gene] += data[k]
                    seen[gene >> 6] |= one << np.uint64(gene & 63)
            for word in range(seen.size):
                bits = seen[word]
                seen[word] = 0
                while bits:
                    gene = (word << 6) + _trailing_zeros(bits)
                    bits &= bits - one
                    genes[n] = gene
                    counts[n] = dense[gene]
                    if not dense[gene] < beyond:
                        return row
                    dense[gene] = 0
                    n += 1
        even = True
        largest[row] = 0
        if n > at:
            top = counts[at]
            for k in range(at, n):
                top = max(top, counts[k])
            largest[row] = top
        if fractions:
            for k in range(at, n):
                even &= np.floor(counts[k]) == counts[k]
        nnz[row], total[row], whole[row] = n - at, sum_, even
        at = n
    return -1


@compiled
def _trailing_zeros(bits: np.uint64) -> int:
    n = 0
    if bits & np.uint64(0xFFFFFFFF) == 0:
        n += 32
        bits >>= np.uint64(32)
    if bits & np.uint64(0xFFFF) == 0:
        n += 16
        bits >>= np.uint64(16)
    if bits & np.uint64(0xFF) == 0:
        n += 8
        bits >>= np.uint64(8)
    if bits & np.uint64(0xF) == 0:
        n += 4
        bits >>= np.uint64(4)
    if bits & np.uint64(0x3) == 0:
        n += 2
        bits >>= np.uint64(2)
    return n + int(bits & np.uint64(1) == 0)


@compiled
def gather(address, length, to, like, out, check):
    """Copies rows from memory addresses to places in ``out``.

    Args:
      address: uint64 [rows], where each row begins; the caller keeps that memory alive.
      length: int64 [rows], its elements.
      to: int64 [rows], where it goes in ``out``.
      like: an array of the type of the elements at these addresses.
      out: filled there.
      check: uint64 [rows], filled with a sum of each row in which every element has another weight.
    """
    for row in range(length.size):
        n = length[row]
        if n == 0:
            check[row] = 0
            continue
        source = numba.carray(pointer(address[row]), n, like.dtype)  # type: ignore[call-arg]
        at = to[row]
        into = out[at : at + n]
        sum_ = np.uint32(0)  # of 32 bits: the processor multiplies eight of these at once
        for k in range(n):
            into[k] = source[k]
            sum_ = np.uint32(sum_ + np.uint32(np.uint32(k + 1) * np.uint32(source[k])))
        check[row] = sum_


@compiled
def content_hash(genes, counts, nnz, out):
    """uint64 [rows, 2]: a hash of the genes of each row and their counts, whatever the type they are held in.

    Each (gene, count) is mixed on its own and the results are added up, twice with different keys.
    """
    golden = np.uint64(0x9E3779B97F4A7C15)
    other = np.uint64(0xC2B2AE3D27D4EB4F)
    at = 0
    for row in range(nnz.size):
        first, second = mix(np.uint64(nnz[row]) + golden), mix(np.uint64(nnz[row]) + other)
        for k in range(at, at + nnz[row]):
            count = np.float64(counts[k])
            even = np.floor(count)
            rest = np.uint64((count - even) * 2.0**52)
            pair = mix((np.uint64(genes[k]) << np.uint64(32)) + np.uint64(even) + rest * other)
            first += mix(pair + golden)
            second += mix((pair ^ other) * golden)
        out[row, 0], out[row, 1] = first, second
        at += nnz[row]
