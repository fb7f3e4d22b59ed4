"""Reference indices: embedded cells of known kinds, and where new cells lie among them.

    reference = scjax.build_reference(atlas, model="runs/atlas", labels=["cell_type"], group="donor")
    reference.save("atlas_index")
    scjax.map_cells(query, "atlas_index", batch="donor")     # query.obs["scjax_cell_type"], ...

Search is exact (scikit-learn). Each rule by which a cell gets a label, a set of labels or none is set by the
reference itself: by what its cells look like when each is mapped onto the others, or, given ``group``, onto
those of other donors or studies.
"""

from scjax.reference.index import Reference, build_reference
from scjax.reference.mapping import map_cells

__all__ = ["Reference", "build_reference", "map_cells"]
