// Page streams over real sockets: everything comes over, in any encoding, through lost connections; demands overtake; and
// what breaks the rules ends the stream and changes nothing.
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>

#include "bits.h"
#include "checksum.h"
#include "harness.h"
#include "stream_internal.h"

#define PAGE 4096ul
enum { PAGES = 3000, EPOCH = 7 };

struct side {
    int fd;
    struct tm_spool *spool;
};

static struct side make_side(uint64_t pages) {
    struct side side = {.fd = (int)syscall(SYS_memfd_create, "spool", MFD_CLOEXEC)};
    CHECK_OK(tm_spool_create(side.fd, pages, 1, &side.spool, why));
    CHECK_OK(tm_spool_track(side.spool, why));
    return side;
}

// Every third page is zero, the rest hold their number; every second of those compresses.
static void make_page(uint64_t page, unsigned char *out) {
    memset(out, 0, PAGE);
    if (page % 3 == 0) {
        return;
    }
    unsigned seed = (unsigned)page;
    for (unsigned long i = 0; i < PAGE; i++) {
        out[i] = page % 2 ? (unsigned char)page : (unsigned char)rand_r(&seed);
    }
    memcpy(out, &page, sizeof page);
}

static void put(const struct side *side, uint64_t first, uint64_t n) {
    unsigned char page[PAGE];
    for (uint64_t i = first; i < first + n; i++) {
        make_page(i, page);
        CHECK_OK(tm_spool_put(side->spool, i, page, 1, NULL, why));
    }
}

static void check_all(const struct side *side, const struct tm_run *run) {
    unsigned char page[PAGE], wanted[PAGE];
    for (uint64_t i = run->first; i < run->first + run->n; i++) {
        make_page(i, wanted);
        CHECK(tm_bits_test(tm_spool_present(side->spool), i), "page %lu is not there", (unsigned long)i);
        CHECK_OK(tm_spool_get(side->spool, i, page, 1, why));
        CHECK(memcmp(page, wanted, PAGE) == 0, "page %lu is another", (unsigned long)i);
    }
}

static struct tm_sender *make_sender(const struct side *side, const struct tm_run *run, int encoding) {
    struct tm_sender_options options = {.epoch = EPOCH, .encoding = encoding, .n_streams = 1};
    struct tm_sender *sender = NULL;
    CHECK_OK(tm_sender_create(side->spool, &options, &sender, why));
    CHECK_OK(tm_sender_expect(sender, NULL, run, 1, NULL, 0, why));
    return sender;
}

static struct tm_arrival *make_arrival(const struct side *side, const struct tm_run *run) {
    struct tm_arrival *arrival = NULL;
    CHECK_OK(tm_arrival_create(side->spool, 0, EPOCH, &arrival, why));
    CHECK_OK(tm_arrival_expect(arrival, PAGES, run, 1, NULL, 0, why));
    return arrival;
}

static void join_sides(struct tm_sender *sender, struct tm_arrival *arrival, int kind, int breaks[2]) {
    int pair[2];
    CHECK(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair) == 0, "socketpair");
    if (breaks) {
        breaks[0] = dup(pair[0]);
        breaks[1] = dup(pair[1]);
    }
    CHECK_OK(tm_arrival_stream(arrival, pair[1], dup(pair[1]), kind, why));
    CHECK_OK(tm_sender_stream(sender, pair[0], dup(pair[0]), kind, why));
}

static void comes_over(int encoding) {
    struct tm_run run = {5, PAGES - 10};
    struct side from = make_side(PAGES), to = make_side(PAGES);
    put(&from, 0, PAGES / 2);
    struct tm_sender *sender = make_sender(&from, &run, encoding);
    struct tm_arrival *arrival = make_arrival(&to, &run);
    join_sides(sender, arrival, TM_STREAM_PAGES, NULL);
    join_sides(sender, arrival, TM_STREAM_PAGES, NULL);
    join_sides(sender, arrival, TM_STREAM_DEMAND, NULL);
    CHECK(!tm_arrival_require(arrival, PAGES / 2 + 9, 1, 1), "a page came that is not there");
    put(&from, PAGES / 2, PAGES - PAGES / 2); // the capture goes on while it is sent
    CHECK(tm_arrival_require(arrival, 0, PAGES, 30000), "not all has come");
    check_all(&to, &run);
    CHECK(!tm_bits_test(tm_spool_present(to.spool), 4), "a page that was not expected");
    struct tm_stream_progress progress;
    tm_arrival_progress(arrival, &progress);
    CHECK(progress.sent == run.n && progress.lost == 0, "%lu pages", (unsigned long)progress.sent);
    CHECK(encoding == TM_RAW || progress.packed_bytes < progress.unpacked_bytes, "nothing was packed");
    tm_sender_destroy(sender);
    tm_arrival_destroy(arrival);
    tm_spool_destroy(from.spool);
    tm_spool_destroy(to.spool);
}

static void raw(void) { comes_over(TM_RAW); }

static void lz4(void) {
    if (tm_encoding_check(TM_LZ4, NULL) == TM_OK) comes_over(TM_LZ4);
}

static void zstd(void) {
    if (tm_encoding_check(TM_ZSTD, NULL) == TM_OK) comes_over(TM_ZSTD);
}

// Cut again and again; what the other side has is told, and the rest is sent again.
static void goes_on_after_a_loss(void) {
    struct tm_run run = {0, PAGES};
    struct side from = make_side(PAGES), to = make_side(PAGES);
    put(&from, 0, PAGES);
    struct tm_sender *sender = make_sender(&from, &run, TM_RAW);
    struct tm_arrival *arrival = make_arrival(&to, &run);
    static struct tm_run had[PAGES];
    for (unsigned i = 0; i < 20; i++) {
        int ends[2];
        join_sides(sender, arrival, TM_STREAM_PAGES, ends);
        tm_arrival_require(arrival, i * (PAGES / 20), 1, 1000);
        shutdown(ends[i % 2], SHUT_RDWR);
        close(ends[0]);
        close(ends[1]);
        tm_sender_stop(sender);
        tm_arrival_stop(arrival);
        uint64_t n = tm_arrival_present(arrival, had, PAGES);
        CHECK_OK(tm_sender_had(sender, had, (uint32_t)n, why));
    }
    join_sides(sender, arrival, TM_STREAM_PAGES, NULL);
    CHECK(tm_arrival_require(arrival, 0, PAGES, 30000), "not all has come");
    check_all(&to, &run);
    tm_sender_destroy(sender);
    tm_arrival_destroy(arrival);
    tm_spool_destroy(from.spool);
    tm_spool_destroy(to.spool);
}

// ---- what breaks the rules

struct broken {
    const char *what;
    struct tm_frame frame;
    uint32_t sums[4];
    int pages; // of payload that follow
};

static int feed(struct tm_arrival *arrival, const struct broken *broken) {
    static char zeros[PAGE * 64];
    int fd = (int)syscall(SYS_memfd_create, "frames", MFD_CLOEXEC), null = open("/dev/null", O_WRONLY | O_CLOEXEC);
    ssize_t bytes = write(fd, &broken->frame, sizeof broken->frame);
    bytes += write(fd, broken->sums, sizeof broken->sums[0] * (broken->frame.n_pages <= 4 ? broken->frame.n_pages : 4));
    bytes += write(fd, zeros, PAGE * (size_t)broken->pages);
    CHECK(bytes > 0 && lseek(fd, 0, SEEK_SET) == 0, "write");
    struct tm_error error = {0};
    int code = tm_arrival_take(arrival, fd, null, TM_STREAM_PAGES, &error);
    close(fd);
    close(null);
    return code;
}

#define GOOD .magic = TM_FRAME_MAGIC, .type = TM_FRAME_PAGES, .epoch = EPOCH

static void broken_frames(void) {
    static const struct broken all[] = {
        {"magic", {.type = TM_FRAME_PAGES, .n_pages = 1, .epoch = EPOCH, .first = 10}, {0}, 0},
        {"type", {.magic = TM_FRAME_MAGIC, .type = 9, .n_pages = 1, .epoch = EPOCH, .first = 10}, {0}, 0},
        {"no pages", {GOOD, .n_pages = 0, .first = 10}, {0}, 0},
        {"too many", {GOOD, .n_pages = 65, .first = 10}, {0}, 0},
        {"too long", {GOOD, .n_pages = 1, .first = 10, .bytes = PAGE + 1}, {5}, 1},
        {"outside", {GOOD, .n_pages = 2, .first = PAGES - 1}, {0}, 0},
        {"far outside", {GOOD, .n_pages = 1, .first = UINT64_MAX}, {0}, 0},
        {"not expected", {GOOD, .n_pages = 1, .first = 4}, {0}, 0},
        {"half expected", {GOOD, .n_pages = 2, .first = 4}, {0}, 0},
        {"wrong sum", {GOOD, .n_pages = 1, .first = 10, .bytes = PAGE}, {12345}, 1},
        {"short payload", {GOOD, .n_pages = 2, .first = 10, .bytes = PAGE}, {5, 5}, 1},
        {"not packed", {GOOD, .n_pages = 1, .first = 10, .bytes = 64, .encoding = TM_LZ4}, {5}, 1},
        {"bad encoding", {GOOD, .n_pages = 1, .first = 10, .bytes = 64, .encoding = 3}, {5}, 1},
        {"the other way", {.magic = TM_FRAME_MAGIC, .type = TM_FRAME_WANT, .n_pages = 1, .epoch = EPOCH}, {0}, 0},
    };
    struct tm_run run = {5, PAGES - 10};
    struct side to = make_side(PAGES);
    struct tm_arrival *arrival = make_arrival(&to, &run);
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) {
        int code = feed(arrival, &all[i]);
        CHECK(code == TM_DAMAGED, "%s: code %d", all[i].what, code);
        CHECK(tm_bits_next(tm_spool_present(to.spool), 0, PAGES) == PAGES, "%s: a page was taken", all[i].what);
    }
    struct broken cut = {"cut", {GOOD, .n_pages = 2, .first = 10, .bytes = 2 * PAGE}, {5, 5}, 1};
    CHECK(feed(arrival, &cut) == TM_SYS, "a stream that ends in a frame");
    struct broken old = {
        "old", {.magic = TM_FRAME_MAGIC, .type = TM_FRAME_PAGES, .n_pages = 1, .epoch = 1, .first = 10}, {0}, 0};
    CHECK(feed(arrival, &old) == TM_SYS, "a frame of another attempt is passed over");
    CHECK(tm_bits_next(tm_spool_present(to.spool), 0, PAGES) == PAGES, "an old page was taken");
    tm_arrival_destroy(arrival);
    tm_spool_destroy(to.spool);
}

static void broken_lists(void) {
    static const struct tm_run lists[][2] = {
        {{0, 0}, {1, 1}},          {{5, 5}, {7, 1}},          {{0, PAGES + 1}, {PAGES + 2, 1}},
        {{UINT64_MAX, 1}, {0, 1}}, {{1, UINT64_MAX}, {0, 1}},
    };
    struct side to = make_side(PAGES);
    for (size_t i = 0; i < sizeof lists / sizeof *lists; i++) {
        struct tm_arrival *arrival = NULL;
        struct tm_error error;
        static const struct tm_run all[] = {{0, PAGES}};
        CHECK_OK(tm_arrival_create(to.spool, 0, EPOCH, &arrival, why));
        CHECK(tm_arrival_expect(arrival, PAGES, lists[i], 2, NULL, 0, &error) == TM_DAMAGED, "list %lu",
              (unsigned long)i);
        CHECK(tm_arrival_expect(arrival, PAGES, all, 1, lists[i], 2, &error) == TM_DAMAGED, "kept %lu",
              (unsigned long)i);
        tm_arrival_destroy(arrival);
    }
    tm_spool_destroy(to.spool);
}

// A destination that asks for what there is not.
static void broken_demands(void) {
    static const struct tm_frame wants[] = {
        {.magic = TM_FRAME_MAGIC, .type = TM_FRAME_WANT, .n_pages = 1, .epoch = EPOCH, .first = 4},
        {.magic = TM_FRAME_MAGIC, .type = TM_FRAME_WANT, .n_pages = 2, .epoch = EPOCH, .first = PAGES - 1},
        {.magic = TM_FRAME_MAGIC, .type = TM_FRAME_WANT, .n_pages = 64, .epoch = EPOCH, .first = UINT64_MAX - 3},
        {.magic = TM_FRAME_MAGIC, .type = TM_FRAME_GOT, .epoch = EPOCH},
    };
    struct tm_run run = {5, PAGES - 10};
    struct side from = make_side(PAGES);
    put(&from, 0, PAGES);
    for (size_t i = 0; i < sizeof wants / sizeof *wants; i++) {
        struct tm_sender *sender = make_sender(&from, &run, TM_RAW);
        int pair[2];
        CHECK(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair) == 0, "socketpair");
        CHECK_OK(tm_sender_stream(sender, pair[0], dup(pair[0]), TM_STREAM_DEMAND, why));
        CHECK(write(pair[1], &wants[i], sizeof wants[i]) == sizeof wants[i], "write");
        struct tm_stream_progress progress;
        do {
            tm_sender_progress(sender, &progress);
        } while (progress.lost == 0);
        CHECK(progress.code == TM_DAMAGED && progress.demand_pages == 0, "demand %lu", (unsigned long)i);
        tm_sender_destroy(sender);
        close(pair[1]);
    }
    tm_spool_destroy(from.spool);
}

// ---- before T0

// Each page holds its number and its version all over, so that a torn one is one of neither.
static void put_version(const struct side *side, uint64_t page, uint64_t version) {
    uint64_t words[PAGE / 8];
    for (size_t i = 0; i < PAGE / 8; i++) {
        words[i] = page % 5 == version % 5 ? 0 : page << 32 | version;
    }
    CHECK_OK(tm_spool_put(side->spool, page, words, 1, NULL, why));
}

static void check_same(const struct side *from, const struct side *to, const struct tm_run *runs, size_t n) {
    static unsigned char here[PAGE], there[PAGE];
    for (size_t i = 0; i < n; i++) {
        for (uint64_t page = runs[i].first; page < runs[i].first + runs[i].n; page++) {
            CHECK(tm_bits_test(tm_spool_present(to->spool), page), "page %lu is not there", (unsigned long)page);
            CHECK_OK(tm_spool_get(from->spool, page, here, 1, why));
            CHECK_OK(tm_spool_get(to->spool, page, there, 1, why));
            CHECK(memcmp(here, there, PAGE) == 0, "page %lu is another", (unsigned long)page);
        }
    }
}

struct early {
    struct side from, to;
    struct tm_sender *sender;
    struct tm_arrival *arrival;
    int ends[3][2];
};

static void early_join(struct early *early) {
    join_sides(early->sender, early->arrival, TM_STREAM_PAGES, early->ends[0]);
    join_sides(early->sender, early->arrival, TM_STREAM_DEMAND, early->ends[1]);
    join_sides(early->sender, early->arrival, TM_STREAM_PAGES, early->ends[2]);
}

static void early_close_ends(struct early *early) {
    for (int i = 0; i < 3; i++) {
        close(early->ends[i][0]);
        close(early->ends[i][1]);
    }
}

static void early_begin(struct early *early, uint64_t most) {
    struct tm_sender_options options = {.epoch = EPOCH, .n_streams = 2};
    *early = (struct early){.from = make_side(PAGES), .to = make_side(PAGES)};
    CHECK_OK(tm_sender_create(early->from.spool, &options, &early->sender, why));
    CHECK_OK(tm_arrival_create(early->to.spool, most, EPOCH, &early->arrival, why));
    tm_sender_early(early->sender, most);
    early_join(early);
}

static void early_end(struct early *early) {
    early_close_ends(early);
    tm_sender_destroy(early->sender);
    tm_arrival_destroy(early->arrival);
    tm_spool_destroy(early->from.spool);
    tm_spool_destroy(early->to.spool);
    close(early->from.fd);
    close(early->to.fd);
}

static void early_cut(struct early *early, unsigned which) {
    shutdown(early->ends[which % 3][which % 2], SHUT_RDWR);
    early_close_ends(early);
    tm_sender_stop(early->sender);
    tm_arrival_stop(early->arrival);
    early_join(early);
}

// T0 of a spool of which some runs are expected: what was sent before and is still valid is not sent again.
static void early_t0(struct early *early, const struct tm_run *expected, uint64_t n) {
    CHECK_OK(tm_sender_expect(early->sender, NULL, expected, n, NULL, 0, why));
    const struct tm_run *kept;
    uint64_t n_kept = tm_sender_kept(early->sender, &kept);
    CHECK_OK(tm_arrival_expect(early->arrival, PAGES, expected, n, kept, n_kept, why));
    CHECK(tm_arrival_require(early->arrival, 0, PAGES, 30000), "not all has come");
    check_same(&early->from, &early->to, expected, n);
    unsigned char page[PAGE];
    static const unsigned char zeros[PAGE];
    CHECK_OK(tm_spool_get(early->to.spool, PAGES - 1, page, 1, why));
    CHECK(memcmp(page, zeros, PAGE) == 0, "a page of before T0 that is not expected is still there");
}

static const struct tm_run some[] = {{0, 1000}, {1500, 1400}};

static uint64_t kept_pages(const struct early *early) {
    const struct tm_run *kept;
    uint64_t n = tm_sender_kept(early->sender, &kept), pages = 0;
    for (uint64_t i = 0; i < n; i++) {
        pages += kept[i].n;
    }
    return pages;
}

// Pages are stored over and over while they are sent, connections are cut, and then comes T0.
static void early_pages(void) {
    struct early early;
    unsigned seed = 1;
    early_begin(&early, PAGES);
    for (uint64_t page = 0; page < PAGES; page++) {
        put_version(&early.from, page, 1);
    }
    for (unsigned version = 2; version < 60; version++) {
        for (int i = 0; i < 200; i++) {
            put_version(&early.from, (uint64_t)rand_r(&seed) % PAGES, version);
        }
        if (version % 10 == 0) {
            early_cut(&early, version / 10);
        }
    }
    CHECK(tm_sender_halt(early.sender, 20000), "what was sent is not confirmed");
    uint64_t left = tm_sender_backlog(early.sender);
    for (uint64_t page = 0; page < PAGES; page += 100) { // after it
        put_version(&early.from, page, 1000);
    }
    early_t0(&early, some, 2);
    CHECK(kept_pages(&early) + left + 30 >= 2400, "only %lu pages were kept", (unsigned long)kept_pages(&early));
    early_end(&early);
}

static void wait_for_backlog(const struct early *early) {
    for (int i = 0; tm_sender_backlog(early->sender) && i < 20000; i++) {
        usleep(1000);
    }
    CHECK(tm_sender_backlog(early->sender) == 0, "not all was given");
}

static void early_all_are_kept(void) {
    struct early early;
    early_begin(&early, PAGES);
    for (uint64_t page = 0; page < PAGES; page++) {
        put_version(&early.from, page, 1);
    }
    wait_for_backlog(&early);
    CHECK(tm_sender_halt(early.sender, 20000), "what was sent is not confirmed");
    tm_spool_forget(early.from.spool, 100, 50); // left to the window
    CHECK_OK(tm_sender_expect(early.sender, NULL, some, 2, NULL, 0, why));
    CHECK(kept_pages(&early) == 2350, "%lu pages were kept", (unsigned long)kept_pages(&early));
    const struct tm_run *kept;
    uint64_t n_kept = tm_sender_kept(early.sender, &kept);
    CHECK_OK(tm_arrival_expect(early.arrival, PAGES, some, 2, kept, n_kept, why));
    CHECK(!tm_arrival_require(early.arrival, 100, 1, 20), "a page came that is not there");
    for (uint64_t page = 100; page < 150; page++) {
        put_version(&early.from, page, 7);
    }
    CHECK(tm_arrival_require(early.arrival, 0, PAGES, 30000), "not all has come");
    check_same(&early.from, &early.to, some, 2);
    struct tm_stream_progress progress;
    tm_sender_progress(early.sender, &progress);
    CHECK(progress.sent == progress.expected, "%lu of %lu", (unsigned long)progress.sent,
          (unsigned long)progress.expected);
    early_end(&early);
}

// The destination takes no more than was announced, and the source gives no more.
static void early_most(void) {
    struct early early;
    early_begin(&early, 500);
    for (uint64_t page = 0; page < PAGES; page++) {
        put_version(&early.from, page, 1);
    }
    usleep(100000);
    CHECK(tm_sender_halt(early.sender, 20000), "what was sent is not confirmed");
    struct tm_stream_progress progress;
    tm_arrival_progress(early.arrival, &progress);
    CHECK(progress.sent == 500 && progress.lost == 0, "%lu pages", (unsigned long)progress.sent);
    CHECK(tm_sender_backlog(early.sender) == 0, "there is more to be given than may be");
    early_t0(&early, some, 2);
    early_end(&early);
}

// A page that changed while it was sent is as if it had not come; one that is said to be there and is not is told.
static void early_torn(void) {
    struct side to = make_side(PAGES);
    struct tm_arrival *arrival = NULL;
    struct tm_error error;
    static const struct tm_run all = {0, PAGES}, one = {7, 1};
    unsigned char page[PAGE] = {1};
    CHECK_OK(tm_arrival_create(to.spool, PAGES, EPOCH, &arrival, why));
    uint32_t sum = tm_page_sum(page);
    uint64_t fresh = 0;
    CHECK_OK(tm_spool_place(to.spool, 7, 1, &sum, 1, (char *)page, 1, &fresh, why));
    CHECK(fresh == 1, "%lu pages came", (unsigned long)fresh);
    CHECK(tm_bits_test(tm_spool_present(to.spool), 7), "a page did not come");
    sum++;
    CHECK(tm_spool_place(to.spool, 7, 1, &sum, 1, (char *)page, 0, &fresh, &error) == TM_DAMAGED, "a wrong sum passes");
    CHECK_OK(tm_spool_place(to.spool, 7, 1, &sum, 1, (char *)page, 1, &fresh, why));
    CHECK(!tm_bits_test(tm_spool_present(to.spool), 7), "a torn page came");
    CHECK(tm_spool_sums(to.spool)[7] == 0, "something of an older one has stayed");
    CHECK(tm_arrival_expect(arrival, PAGES, &all, 1, &one, 1, &error) == TM_DAMAGED,
          "a page that is not there is kept");
    tm_arrival_destroy(arrival);
    tm_spool_destroy(to.spool);
    close(to.fd);
}

int main(int argc, char **argv) {
    (void)argc;
    only = argv[1];
    RUN(raw, 60);
    RUN(lz4, 60);
    RUN(zstd, 60);
    RUN(goes_on_after_a_loss, 60);
    RUN(broken_frames, 60);
    RUN(broken_lists, 60);
    RUN(broken_demands, 60);
    RUN(early_pages, 60);
    RUN(early_all_are_kept, 60);
    RUN(early_most, 60);
    RUN(early_torn, 60);
    return failures != 0;
}
