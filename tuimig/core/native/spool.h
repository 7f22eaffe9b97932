// The spool: captured pages at fixed places, in any order, from several threads, with a checksum each.
// `pages` is a sparse file or memfd; a page that is all zero is a hole. The sums live in memory (4 bytes a page)
// until they are written beside it: a mapped file on a full disk would be a SIGBUS.
#ifndef TM_SPOOL_H
#define TM_SPOOL_H
#include "error.h"

struct tm_spool;

// Does not take over pages_fd. n_pages may be 0 and grown later. writable 0: read only.
int tm_spool_create(int pages_fd, uint64_t n_pages, int writable, struct tm_spool **out, struct tm_error *error);
void tm_spool_destroy(struct tm_spool *spool);

// Grow to n_pages (never shrinks). Not while another thread uses the spool.
int tm_spool_grow(struct tm_spool *spool, uint64_t n_pages, struct tm_error *error);

// Cut it to n_pages; from there on no page is there. Its tables stay as they are.
int tm_spool_cut(struct tm_spool *spool, uint64_t n_pages, struct tm_error *error);

// Store n_pages pages at index first. Zero pages are left as holes, runs of others are written in one pwrite.
// Threads may store distinct pages at once. *zero (may be null) counts the zero pages found.
int tm_spool_put(struct tm_spool *spool, uint64_t first, const void *data, uint64_t n_pages, uint64_t *zero,
                 struct tm_error *error);

// Read n_pages pages at index first into data and check their sums (sum 0: must be all zero, and is not read).
// TM_DAMAGED with address = page index of the first bad one.
int tm_spool_get(struct tm_spool *spool, uint64_t first, void *data, uint64_t n_pages, struct tm_error *error);

// The same of pages whose sums were checked when they came, and which nobody else writes.
int tm_spool_get_checked(struct tm_spool *spool, uint64_t first, void *data, uint64_t n_pages, struct tm_error *error);

// Make n_pages pages from index first holes. Not while another thread uses these pages.
int tm_spool_clear(struct tm_spool *spool, uint64_t first, uint64_t n_pages, struct tm_error *error);

// Sums: one uint32 a page; 0 means zero page. Never null once n_pages > 0.
uint32_t *tm_spool_sums(struct tm_spool *spool);
uint64_t tm_spool_stored(const struct tm_spool *spool); // pages with content
uint64_t tm_spool_pages(const struct tm_spool *spool);
int tm_spool_file(const struct tm_spool *spool); // the descriptor it was made with

// From now on bitmaps tell which pages are there (a zero page is there once it was stored), and which of them somebody has
// been given since they were stored last. Before other threads use the spool. It may grow beside its readers then, as far
// as tm_spool_room says.
int tm_spool_track(struct tm_spool *spool, struct tm_error *error);
// Words of 64 pages, atomic; null where not tracked, or as long as the spool has no pages.
uint64_t *tm_spool_present(const struct tm_spool *spool);
uint64_t *tm_spool_given(const struct tm_spool *spool); // set by who gives them
uint64_t tm_spool_room(const struct tm_spool *spool);
// What was stored of these pages is not valid any more: they are neither there nor given.
void tm_spool_forget(struct tm_spool *spool, uint64_t first, uint64_t n_pages);
// At most 64 pages that come from elsewhere, those of them with a bit in `wanted`: `data` has the content of all that have
// one (a sum above 1), in a row. The sums are checked, then the pages are stored and there; *fresh counts those that were
// not. TM_DAMAGED: a sum is wrong; may_tear: then it is as if the page had not come, for a source that runs on changes
// pages while it sends them, and sends them again. Not the same page in two threads.
int tm_spool_place(struct tm_spool *spool, uint64_t first, uint64_t n_pages, const uint32_t *sums, uint64_t wanted,
                   const char *data, int may_tear, uint64_t *fresh, struct tm_error *error);

// CRC32C of one 4096-byte page; 0 if and only if the page is all zero.
uint32_t tm_page_sum(const void *page);

#endif
