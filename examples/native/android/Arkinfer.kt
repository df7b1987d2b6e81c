package com.example.arkinfer

/**
 * One conversation with an artifact in `folder`, a path of the app's own storage. Token ids in, token ids out.
 *
 *     Arkinfer.session(File(filesDir, "model.ark").path).use { it.generate(intArrayOf(5, 9, 300), limit = 64, seed = 1) }
 */
class Session internal constructor(private val handle: Long) : AutoCloseable {
    /** Blocks until the answer is complete: call it from a thread of your own. */
    fun generate(prompt: IntArray, limit: Int, seed: Long): IntArray = Arkinfer.generate(handle, prompt, limit, seed)

    /** Ends a running `generate` from any thread; what it has so far is its result. */
    fun cancel() = Arkinfer.cancel(handle)

    override fun close() = Arkinfer.close(handle)
}

object Arkinfer {
    init {
        System.loadLibrary("arkinfer_jni") // which needs libarkinfer.so
    }

    fun session(folder: String) = Session(open(folder))

    @JvmStatic private external fun open(path: String): Long
    @JvmStatic external fun generate(handle: Long, prompt: IntArray, limit: Int, seed: Long): IntArray
    @JvmStatic external fun cancel(handle: Long)
    @JvmStatic external fun close(handle: Long)
}
