// Pictures of memory for those who watch: pages by cell, where a cell is a set of address spans. Only counts; the work
// does not depend on them.
#ifndef TM_CELLS_H
#define TM_CELLS_H
#include "source.h"

struct tm_span { // ascending, not overlapping
    uint64_t start;
    uint64_t end;
    uint32_t cell; // index into the cells
    uint32_t pad;
};

struct tm_cell { // pages
    uint64_t total;
    uint64_t done;
    uint64_t zero; // of those done
};

// Adds the source's pages with content to the cells, as far as the last freeze's capture has come.
void tm_source_cells(const struct tm_source *source, const struct tm_span *spans, uint32_t n, struct tm_cell *cells);

// Adds the pages that are populated to `done` of the cells. pagemap_fd: /proc/PID/pagemap. TM_GONE: the process ended.
int tm_present_cells(int pagemap_fd, const struct tm_span *spans, uint32_t n, struct tm_cell *cells,
                     struct tm_error *error);

#endif
