// Coverage-guided fuzzing of what parses a page stream: `make fuzz` (clang's libFuzzer). Whatever comes, no page is taken
// that was not expected, what was taken is what its sum says, and nothing crashes, leaks or grows.
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "bits.h"
#include "checksum.h"
#include "stream_internal.h"

enum { PAGES = 192, EPOCH = 1 };

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void must(int condition) {
    if (!condition) {
        abort();
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    static const struct tm_run expected[] = {{1, 70}, {90, 1}, {100, 80}};
    int file = memfd_create("spool", MFD_CLOEXEC), in = memfd_create("stream", MFD_CLOEXEC);
    int out = open("/dev/null", O_WRONLY | O_CLOEXEC);
    struct tm_spool *spool = NULL;
    struct tm_arrival *arrival = NULL;
    struct tm_error error;
    must(file >= 0 && in >= 0 && out >= 0);
    must(write(in, data, size) == (ssize_t)size && lseek(in, 0, SEEK_SET) == 0);
    must(tm_spool_create(file, PAGES, 1, &spool, &error) == TM_OK && tm_spool_track(spool, &error) == TM_OK);
    must(tm_arrival_create(spool, 100, EPOCH, &arrival, &error) == TM_OK);
    int early = size % 2; // T0 is not until all has come
    if (early) {          // T0 does not come while it is read
        tm_arrival_quit(arrival);
    } else {
        must(tm_arrival_expect(arrival, PAGES, expected, 3, NULL, 0, &error) == TM_OK);
    }
    must(tm_arrival_take(arrival, in, out, TM_STREAM_PAGES, &error) != TM_OK);
    if (early) {
        struct tm_run come[PAGES];
        uint64_t n = tm_arrival_present(arrival, come, PAGES);
        static const struct tm_run all = {0, PAGES};
        must(tm_arrival_expect(arrival, PAGES, &all, 1, come, n / 2, &error) == TM_OK);
        must(tm_arrival_present(arrival, come, PAGES) <= n / 2);
    }
    char page[4096];
    for (uint64_t i = 0; i < PAGES; i++) {
        if (tm_bits_test(tm_spool_present(spool), i)) {
            must(tm_bits_test(tm_arrival_expected(arrival), i));
            must(tm_spool_get(spool, i, page, 1, &error) == TM_OK);
        }
    }
    tm_arrival_destroy(arrival);
    tm_spool_destroy(spool);
    close(file);
    close(in);
    close(out);
    return 0;
}
